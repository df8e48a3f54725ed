"""The life of one cattle server: intended, ordered, watched, deleted. A worker may die at any line of this.

What is about to be done is written down first (``context.remember``), under these keys of the job's state:

``order``     name, order number, deadline, what is ordered: before anything else
``silentSince`` since when the API has not answered, where there is no server
``waitsSince`` since when there has been no room for it
``keyId``     of the auth key that its machine was given and may not have used
``postedAt``  before the request that creates the server is sent; from here on there may be a server
``serverId``  when it is known
``goneAt``    when its deletion is certain

A job that is leased again looks for its own label before it orders. A server that carries the job's label and the number of
the order that is written down is adopted. One with the job's label and another number is of an attempt whose tokens
are void: it is deleted. When no answer came and nothing is to be seen, a server may still be on its way: nothing is ordered
before ``settle_s`` have passed, and then under the same name, which the API takes once only. So the worst that a kill can do is
a server that lives until its own job, or the reaper, deletes it.
"""

from __future__ import annotations

import logging
import random as randomness
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from clawdlets_ops.cattle import labels, room, userdata
from clawdlets_ops.cattle.keys import KeyDesk
from clawdlets_ops.cattle.orders import Offer, Wanted, judge
from clawdlets_ops.cattle.userdata import Parts, PersonaFile
from clawdlets_ops.cloud import MANAGED_BY, MANAGER, Firewall, FirewallRule, Server
from clawdlets_ops.errors import CattleError, ClawdletsError, CloudError, OutcomeUnknown, UnreachableError
from clawdlets_ops.herd import Cattle, seconds
from clawdlets_ops.orchestrator.jobs import Context, Fatal, Job, Json, Later, Retry
from clawdlets_ops.sensitive import Secret

log = logging.getLogger(__name__)

FIREWALL: Final = "clawdlets-cattle"
RULES: Final = (
    FirewallRule("in", "udp", "41641", ("0.0.0.0/0", "::/0"), "Tailscale, direct connections; nothing else comes in"),
)
OVERTIME_S: Final = 3600
"""How long after its deadline an API that does not answer is asked about a job's server before the job fails."""
GRACE_S: Final = 60
"""How long after its deadline a server is waited for before it is deleted by its job; the reaper does it by itself too."""
MAX_EVENT_WAIT_S: Final = 5.0

_NEXT_OFFER: Final = ("resource_unavailable", "placement_error", "resource_limit_exceeded")
_WAIT: Final = {"rate_limit_exceeded": 60.0, "resource_unavailable": 120.0, "placement_error": 120.0, "locked": 10.0}


class HerdCloud(Protocol):
    """What this asks of the Hetzner API (``hetzner.HetznerCloud``)."""

    def servers_with(self, labels: Mapping[str, str]) -> tuple[Server, ...]: ...

    def server_by_id(self, server_id: int) -> Server | None: ...

    def server(self, name: str) -> Server | None: ...

    def order_server(
        self,
        name: str,
        *,
        image: str,
        server_type: str,
        location: str,
        labels: Mapping[str, str],
        user_data: Secret,
        firewalls: Sequence[int],
    ) -> Server: ...

    def delete_server(self, server_id: int) -> None: ...

    def make_firewall(self, name: str, *, rules: Sequence[FirewallRule], labels: Mapping[str, str]) -> Firewall: ...


class TokenDesk(Protocol):
    """What this asks of the one-time tokens."""

    def issue(self, job: Job, *, node: str, persona: str, ttl_s: int) -> Secret:
        """A bootstrap token for the machine of this job; unused older ones of the job are void from now on."""
        ...

    def bind(self, job_id: str, server_id: int) -> None:
        """The job's tokens are good for this server only; before that, for none."""
        ...

    def revoke(self, job_id: str) -> None:
        """The job's tokens are good for nothing any more."""
        ...


@dataclass(frozen=True)
class Spawner:
    """The handler of ``cattle.spawn``. ``host`` is the orchestrator's; ``base_url`` where machines fetch their environment;
    ``unfinished`` lists the unfinished jobs of this kind, running or waiting; ``never`` what no user data may hold. Own
    state is looked at every ``poll_s``; the API is asked every ``look_s`` about a server that runs, and for room."""

    host: str
    cattle: Callable[[], Cattle]
    files: Callable[[str], tuple[PersonaFile, ...]]
    cloud: HerdCloud
    tokens: TokenDesk
    keys: KeyDesk
    unfinished: Callable[[], Sequence[Job]]
    base_url: Callable[[], str]
    never: Callable[[], Sequence[Secret]] = lambda: ()
    authorized_keys: tuple[str, ...] = ()
    settle_s: float = 45.0
    poll_s: float = 2.0
    look_s: float = 20.0
    room_s: float = 3600.0
    jitter: Callable[[], float] = randomness.random
    new_order: Callable[[], str] = field(default=lambda: secrets.token_hex(8))
    servers_lately: room.Servers = field(default_factory=room.Servers, compare=False)

    def __call__(self, job: Job, context: Context) -> Json:
        """See the job's server through its life; the result of the job is what the task said, and when what happened.

        An API that does not answer a question costs no attempt: what is there is still there, and is asked about later, for
        as long as the server may live, or for ``room_s`` where none is known.
        """
        try:
            return self._live(job, context)
        except OutcomeUnknown:
            raise
        except (CloudError, UnreachableError) as error:
            job, now = _as_now(job, context.remember()), context.clock()
            since = min(int(job.state.get("silentSince", now)), now)
            until = since + 1000 * self.room_s
            if "serverId" in job.state:
                until = 1000 * (job.state["order"]["deadline"] + OVERTIME_S)
            if now >= until:
                raise
            # Where nothing was ordered, it takes nobody's place.
            context.remember(silentSince=since, **({} if "postedAt" in job.state else {"order": None}))
            raise Later(f"{error.where}: {error.what}", after_s=min(30.0, self.look_s)) from None

    def _live(self, job: Job, context: Context) -> Json:
        job = _as_now(job, context.remember(attempt=job.attempt))
        if "goneAt" in job.state:  # the last worker died between the deletion and its word about it
            return self._ended(job, context)
        server = self._standing(job, context)
        if server is None and "serverId" in job.state:  # it was there, and is not any more
            return self._ended(_as_now(job, context.remember(goneAt=context.clock())), context)
        if server is None:
            server = self._order(job, context)
        job = _as_now(job, context.remember(serverId=server.id, silentSince=None))
        self.tokens.bind(job.job_id, server.id)
        return self._watch(job, context, server)

    def clean_up(self, job: Job, context: Context) -> None:
        """Nothing of a canceled job is left: no server, no token."""
        self._delete_all(job, context)

    # --- is there one already? ---

    def _standing(self, job: Job, context: Context) -> Server | None:
        """The server of this job that is there and may be used; None when one may be ordered."""
        if "postedAt" not in job.state:
            return None
        order = job.state["order"]
        known = job.state.get("serverId")
        found = self._look(job)
        if not found and known is None:
            context.note("no answer to the order is known: waiting for what it may have made")
            found = self._settle(job, context)
        for server in found:
            brand = labels.read(server.labels)
            if brand is not None and brand.order == order["order"]:
                context.note(f"adopted server {server.id}, which carries this job's label")
                self._delete_others(found, server, context)
                return server
        for server in found:
            context.note(f"server {server.id} is of an earlier order, whose tokens are void")
            self._delete(server.id, job, context)
        return None

    def _look(self, job: Job) -> tuple[Server, ...]:
        found = self.cloud.servers_with(labels.of_job(self.host, job.job_id))
        return tuple(sorted((one for one in found if labels.read(one.labels) is not None), key=lambda one: one.id))

    def _settle(self, job: Job, context: Context) -> tuple[Server, ...]:
        """What an order without an answer has made, once there is something, or nothing after ``settle_s``."""
        until = int(job.state["postedAt"]) + int(self.settle_s * 1000)
        # A clock that was set back must not make this wait for longer than it ever should.
        left_s = min(self.settle_s, (until - context.clock()) / 1000)
        while True:
            found = self._look(job)
            if found or left_s <= 0:
                return found
            pause = min(self.poll_s, left_s)
            context.sleep(pause)
            left_s -= pause

    # --- ordering ---

    def _order(self, job: Job, context: Context) -> Server:
        cattle = self.cattle()
        wanted, faults = judge(job.payload, job.requester, cattle)
        if wanted is None:
            raise Fatal("; ".join(f"{fault.field}: {fault.message}" for fault in faults))
        name = labels.server_name(wanted.persona, job.job_id)
        brand = labels.Brand(
            orchestrator=self.host,
            job_id=job.job_id,
            order=self.new_order(),
            persona=wanted.persona,
            bot=labels.bot_label(job.requester),
            ttl_s=wanted.ttl_s,
            deadline_s=context.clock() // 1000 + wanted.ttl_s,
        )
        order = {"name": name, "order": brand.order, "deadline": brand.deadline_s, "persona": wanted.persona}
        job = self._take_place(job, {**order, "at": context.clock()}, wanted, context)
        order = job.state["order"]
        firewall = self._firewall()
        document = self._document(job, wanted, brand, cattle, context)
        last = CloudError("nothing is allowed to be ordered", where=name)
        for offer in wanted.offers:
            context.check()
            job = _as_now(job, context.remember(postedAt=context.clock(), order={**order, **_told(offer)}))
            try:
                return self.cloud.order_server(
                    name,
                    image=offer.image,
                    server_type=offer.server_type,
                    location=offer.location,
                    labels=brand.labels(cattle.labels),
                    user_data=document,
                    firewalls=(firewall.id,),
                )
            except OutcomeUnknown as error:
                return self._after_unknown(job, context, brand.order, error)
            except CloudError as error:
                if error.code == "uniqueness_error":
                    return self._after_clash(job, context, brand.order)
                last = error
                context.note(f"{offer.server_type} in {offer.location}: {error.code}")
                if error.code not in _NEXT_OFFER:
                    break
        self._forget(job, context)
        raise Retry(last.what, after_s=_WAIT.get(last.code)) if _may_pass(last) else Fatal(last.what)

    def _after_unknown(self, job: Job, context: Context, order: str, error: OutcomeUnknown) -> Server:
        """Look, and only look: another request could make a second one."""
        context.note(f"whether there is a server is not known: {error.what}")
        for server in self._settle(job, context):
            brand = labels.read(server.labels)
            if brand is not None and brand.order == order:
                context.note(f"adopted server {server.id}, which the order without an answer made")
                return server
        raise Retry(f"{error.what}; no server came of it")

    def _after_clash(self, job: Job, context: Context, order: str) -> Server:
        """The name is taken: by an order of this same job that was on its way, or by somebody else."""
        context.check()  # a worker that was away for long may look at what its successor has ordered
        for server in self._look(job):
            brand = labels.read(server.labels)
            if brand is not None and brand.order == order:
                return server
            context.note(f"server {server.id} is of an earlier order, whose tokens are void")
            self._delete(server.id, job, context)
            raise Retry("a server of an earlier order had to go first", after_s=1.0)
        self._void(job, context)
        raise Fatal(f"there is a server called {job.state['order']['name']} that is not this job's")

    def _forget(self, job: Job, context: Context) -> Job:
        """There is no server of this job, and none is on its way."""
        self._void(job, context)
        return _as_now(job, context.remember(postedAt=None, order=None))

    def _take_place(self, job: Job, order: Mapping[str, Any], wanted: Wanted, context: Context) -> Job:
        """The job with its order written down, if there is room for it; Later when there is none, Fatal when there was none
        for ``room_s``. Nobody waits here: the worker is for others meanwhile.

        The caps hold across workers: everybody writes the order down before counting the others', so of two at once at
        least one sees the other; who sees too many takes the order back and comes again after a while that is not the
        other's.
        """
        job = _as_now(job, context.remember(order=dict(order)))
        full = room.full(job, wanted, self.unfinished(), self._ours, self.servers_lately, good_for_s=self.look_s)
        if full is None:
            return _as_now(job, context.remember(waitsSince=None))
        if "postedAt" not in job.state:  # else what it may have made still counts
            job = self._forget(job, context)
        now = context.clock()
        since = min(int(job.state.get("waitsSince", now)), now)
        if now - since >= self.room_s * 1000:
            raise Fatal(f"there was no room for {self.room_s:.0f} s: {full}")
        context.remember(waitsSince=since, silentSince=None)
        raise Later(f"waits for room: {full}", after_s=self.look_s * (0.5 + self.jitter()))

    def _ours(self) -> Sequence[Server]:
        return self.cloud.servers_with(labels.of_orchestrator(self.host))

    def _firewall(self) -> Firewall:
        found = self.cloud.make_firewall(FIREWALL, rules=RULES, labels={MANAGED_BY: MANAGER, labels.CATTLE: "true"})
        if tuple(sorted(found.rules)) != tuple(sorted(RULES)):
            raise Fatal(f"the firewall {FIREWALL} has other rules than it should; delete it, and it is made anew")
        return found

    def _document(self, job: Job, wanted: Wanted, brand: labels.Brand, cattle: Cattle, context: Context) -> Secret:
        persona = cattle.personas[wanted.persona]
        name = job.state["order"]["name"]
        token_ttl_s = seconds(cattle.token_ttl)
        self._void(job, context)
        key = self.keys.mint(name, ttl_s=seconds(cattle.tailnet.key_ttl))
        if key.key_id:
            job = _as_now(job, context.remember(keyId=key.key_id))
        if key.warning:
            context.note(key.warning)
            log.warning("job %s: %s", job.job_id, key.warning)
        parts = Parts(
            auth_key=key.secret,
            token=self.tokens.issue(job, node=name, persona=wanted.persona, ttl_s=token_ttl_s),
            base_url=self.base_url(),
            token_expires_s=context.clock() // 1000 + token_ttl_s,
            settings={
                "schemaVersion": 1,
                "name": name,
                "jobId": job.job_id,
                "persona": wanted.persona,
                "command": list(persona.command),
                "egress": cattle.egress,
                "deadline": brand.deadline_s,
                "maxResultBytes": cattle.max_result_bytes,
            },
            task=wanted.task,
            files=self.files(wanted.persona),
            authorized_keys=self.authorized_keys,
        )
        try:
            document = userdata.render(parts)
            faults = userdata.judge(document.reveal(), never=self.never(), parts=parts)
        except CattleError as error:
            faults = [str(error).replace("\n", " ")]
        if faults:
            self._void(job, context)
            raise Fatal(f"the user data is not sent: {'; '.join(faults)}")
        return document

    # --- watching ---

    def _watch(self, job: Job, context: Context, server: Server) -> Json:
        """Until the result is there, the time is up, or the server is gone or off. The API is asked often until the server
        runs, and rarely then: the result comes to us, and 3600 requests an hour are for everything in the project."""
        deadline_ms = int(job.state["order"]["deadline"]) * 1000
        looked: int | None = None
        said = ""
        while True:
            context.check()
            if context.task_result() is not None:
                job = self._say(job, context, "resultAt")
                break
            if context.clock() >= deadline_ms:
                context.note("its time is up")
                break
            if looked is None or "runningAt" not in job.state or context.clock() - looked >= self.look_s * 1000:
                looked = context.clock()
                try:
                    seen = self.cloud.server_by_id(server.id)
                except CloudError as error:  # it works on, and its result comes to us
                    if error.what != said:
                        said = error.what
                        context.note(f"what has become of server {server.id} is not known: {said}")
                    context.sleep(self.poll_s)
                    continue
                if seen is None:
                    break
                if seen.status == "running":
                    job = self._say(job, context, "runningAt")
                if seen.status == "off" and "runningAt" in job.state:
                    context.note("it is switched off, and is paid for all the same")
                    break
            context.sleep(self.poll_s)
        self._delete_all(job, context)
        job = _as_now(job, context.remember(goneAt=context.clock()))
        return self._ended(job, context)

    def _ended(self, job: Job, context: Context) -> Json:
        self._void(job, context)
        task = context.task_result()
        if task is None:
            raise Fatal(f"server {job.state.get('serverId')} is gone, and sent no result")
        order = job.state["order"]
        moments = ("postedAt", "runningAt", "resultAt", "goneAt")
        return {
            "server": {"id": job.state.get("serverId"), "name": order["name"], "persona": order["persona"]},
            "task": task,
            "timeline": {
                "enqueuedAt": job.created_at,
                "orderedAt": order["at"],
                **{moment: job.state[moment] for moment in moments if job.state.get(moment) is not None},
            },
        }

    def _say(self, job: Job, context: Context, moment: str) -> Job:
        """Write down when something was seen first."""
        return job if moment in job.state else _as_now(job, context.remember(**{moment: context.clock()}))

    # --- deleting ---

    def _void(self, job: Job, context: Context) -> None:
        """What the job's machine was given is good for nothing any more: its tokens, and its auth key unless it has used it,
        for who sends a result has joined."""
        self.tokens.revoke(job.job_id)
        key_id = job.state.get("keyId")
        if key_id is None or context.task_result() is not None:
            return
        try:
            self.keys.revoke(str(key_id))
        except ClawdletsError as error:
            context.note(f"auth key {key_id} is not revoked, and runs out by itself: {error.what}")
        else:
            context.remember(keyId=None)

    def _delete_all(self, job: Job, context: Context) -> None:
        """Every server of the job is gone, also one that is still on its way; its tokens and its key are void."""
        self._void(job, context)
        if job.state.get("postedAt") is None:
            return
        found = self._look(job)
        if not found and job.state.get("serverId") is None:
            found = self._settle(job, context)
        for server in found:
            self._delete(server.id, job, context)

    def _delete_others(self, found: Sequence[Server], kept: Server, context: Context) -> None:
        for server in found:
            if server.id != kept.id:  # the API takes a name once, so somebody has made this one by hand
                context.note(f"server {server.id} carries this job's labels too, and was not ordered by it: left alone")

    def _delete(self, server_id: int, job: Job, context: Context) -> None:
        """Delete this server, which carries the job's labels now, and see that it is gone. An id is never given twice, so
        to ask for the same deletion again, after a look, can do no harm."""
        pause = 0.2
        while (seen := self.cloud.server_by_id(server_id)) is not None:
            if not labels.are_of(job.job_id, seen.labels):
                raise Fatal(f"server {server_id} does not carry this job's labels any more: it is left alone")
            context.check()
            try:
                self.cloud.delete_server(server_id)
            except CloudError as error:
                context.note(f"deleting server {server_id}: {error.what}")
                if not isinstance(error, OutcomeUnknown) and error.code not in _WAIT:
                    raise
            if self.cloud.server_by_id(server_id) is None:
                break
            context.sleep(pause)
            pause = min(pause * 2, MAX_EVENT_WAIT_S)
        context.note(f"server {server_id} is gone")


def _told(offer: Offer) -> dict[str, str]:
    return {"image": offer.image, "serverType": offer.server_type, "location": offer.location}


def _may_pass(error: ClawdletsError) -> bool:
    """Whether the same request may be taken later."""
    return isinstance(error, CloudError) and error.code in (*_WAIT, *_NEXT_OFFER)


def _as_now(job: Job, state: Mapping[str, Any]) -> Job:
    """The job with its state as it is written down, without what was taken back."""
    return replace(job, state={name: value for name, value in state.items() if value is not None})
