# What the schema cannot say: rules between several values. Each is also a validator of the Python models; a test holds that
# both refuse the same fleets. The names, limits and patterns in them are in the schema ("x-rules"), not here.
# fields: a rule for one field that is in itself well formed; models: for an object whose fields are, with its defaults.
{ facts, fits }:
let
  inherit (builtins) all any attrNames attrValues concatMap elem elemAt filter fromJSON genList head length match stringLength
    substring;
  cidr = import ./cidr.nix;
  unless = condition: what: if condition then null else what;
  # The first that is not null.
  # Those behind it are not looked at: they may go by what it has found good.
  first = found: if found == [ ] then null else if head found != null then head found else first (builtins.tail found);
  isPrefix = start: text: substring 0 (stringLength start) text == start;
  isSuffix = end: text: stringLength text >= stringLength end && substring (stringLength text - stringLength end) (-1) text == end;
  contains = part: text: any (at: substring at (stringLength part) text == part) (genList (at: at) (stringLength text));
  indices = items: genList (at: at) (length items);

  publicKey = line:
    let said = match "([^ ]+) [A-Za-z0-9+/]+={0,3}( .*)?" line; in
    !contains "PRIVATE KEY" line && !contains "\n" line && said != null && elem (head said) facts.keyTypes;
  labels = values: unless (!any (name: elem name facts.ownLabels || contains "hetzner.cloud/" name) (attrNames values))
    "a label that clawdlets or Hetzner sets is not to be declared";
  # A second entry of an allow list that says what another says already.
  covers = entry: name: name == bare entry || (isPrefix "." entry && isSuffix entry name);
  bare = entry: if isPrefix "." entry then substring 1 (-1) entry else entry;
  eachOnce = entries: unless
    (entries == null || !any (at: any (other: other != at
      && covers (elemAt entries other) (bare (elemAt entries at))
      && (!isPrefix "." (elemAt entries at) || isPrefix "." (elemAt entries other))) (indices entries)) (indices entries))
    "one entry covers another; take one of them out";
  seconds = duration: let said = match "([0-9]+)([smhd])" duration; in fromJSON (head said) * facts.seconds.${elemAt said 1};
  within = low: duration: high: low <= seconds duration && seconds duration <= high;
  given = value: fallback: if value == null then fallback else value;
in
{
  fields = {
    Host.diskDevice = path: unless (!any (part: part == "..") (filter builtins.isString (builtins.split "/" path))) "must be a plain path below /dev";
    Host.sshAuthorizedKeys = lines: unless (all publicKey lines) "not every one is one public key of an accepted type";
    Host.secrets = wired: unless
      (!any (name: elem name facts.reservedSecrets || isSuffix facts.unencryptedSuffix name) (attrNames wired)) "a name is reserved";
    Hetzner.labels = labels;
    Cattle.labels = labels;
    Provisioning.adminCidrs = texts: unless (!any (text: cidr.parse text == null) texts) "not every one is a network in CIDR form";
    Egress.allowedDomains = eachOnce;
    BotEgress.allowedDomains = eachOnce;
    Bot.environment = values: unless (!any (name: elem name facts.proxyVariables) (attrNames values)) "a variable is set from the egress policy";
    Operator.ageRecipient = text: unless (fits facts.ageRecipient text) "is no age recipient";
    Fleet.operators = people: first [
      (unless (people != { }) "declares nobody")
      (unless (all (name: all (other: name == other || people.${name}.ageRecipient != people.${other}.ageRecipient) (attrNames people)) (attrNames people))
        "two have the same ageRecipient")
    ];
    CattleTailnet.keyTtl = text: unless (within facts.minTtl text facts.maxKeyTtl) "is too short or too long";
    Cattle.tokenTtl = text: unless (within facts.minTokenTtl text facts.maxTokenTtl) "is too short or too long";
  };
  models = {
    Hetzner = it: first [
      (unless (it.ipv4 || it.ipv6) "with neither ipv4 nor ipv6 nobody could reach the host to install it")
      (unless (!elem it.serverType it.serverTypeFallbacks) "serverTypeFallbacks repeat serverType")
    ];
    Provisioning = it: unless (it.adminCidrAllowWorldOpen || !cidr.worldOpen facts.worldOpenBelowPrefix (map cidr.parse it.adminCidrs))
      "adminCidrs open the host to the internet at large";
    Egress = it: unless (it.mode != "proxy-allowlist" || it.allowedDomains != [ ]) "mode proxy-allowlist needs an entry in allowedDomains";
    Host = it: first ([
      (unless (it.sshExposure.mode != "tailnet" || it.tailnet.mode != "none") "sshExposure.mode tailnet with tailnet.mode none is a host that nobody can reach")
      (unless (it.sshAuthorizedKeys != [ ] || it.provisioning.sshPubkeyFile != "") "no admin key")
      (unless (it.provisioning.adminCidrs != [ ]) "provisioning.adminCidrs is empty")
      (unless (!it.orchestrator.enable || it.tailnet.mode != "none") "orchestrator.enable needs a tailnet")
      (unless (!it.orchestrator.enable || it.orchestrator.store != "postgresql" || it.secrets ? clf_database_url)
        "orchestrator.store postgresql needs clf_database_url among the host's secrets")
    ] ++ concatMap (name: let bot = it.bots.${name}; in [
      (unless (given bot.egress.mode it.egress.mode != "proxy-allowlist" || given bot.egress.allowedDomains it.egress.allowedDomains != [ ])
        "bots.${name}.egress: mode proxy-allowlist needs an entry in allowedDomains")
      (unless (all (secret: it.secrets.${secret}.owner or null == facts.botUserPrefix + name) bot.secrets)
        "bots.${name}.secrets: not every one is declared among the host's secrets, for this bot's user")
    ]) (attrNames (it.bots or { })));
    Persona = it: first [
      (unless (!any (fits facts.notVariables) (attrNames it.variables ++ attrNames it.secrets)) "a variable is set on the machine")
      (unless (!any (name: it.secrets ? ${name}) (attrNames it.variables)) "a variable is both in variables and in secrets")
      (unless (!any (secret: elem secret facts.operatorsOwn) (attrValues it.secrets)) "a secret never leaves the host")
      (unless (all (all (name: it.secrets ? ${name})) it.anyOf) "anyOf names what is not in secrets")
    ];
    Cattle = it: first ([
      (unless (within facts.minTtl it.defaultTtl (seconds it.maxTtl) && seconds it.maxTtl <= facts.maxTtl) "defaultTtl and maxTtl do not fit")
      (unless (it.maxPerBot <= it.maxInstances) "maxPerBot is more than maxInstances")
    ] ++ concatMap (name: let bot = it.bots.${name}; narrows = mine: whole: mine == null || (mine != [ ] && all (one: elem one whole) mine); in [
      (unless (all (persona: it.personas ? ${persona}) bot.personas) "bots.${name}.personas: there is no such persona")
      (unless (bot.maxTtl == null || within facts.minTtl bot.maxTtl (seconds it.maxTtl)) "bots.${name}.maxTtl is too short or too long")
      (unless (bot.maxInstances == null || bot.maxInstances <= it.maxInstances) "bots.${name}.maxInstances is more than maxInstances")
      (unless (narrows bot.images it.images && narrows bot.serverTypes it.serverTypes && narrows bot.locations it.locations)
        "bots.${name} asks for what is not among images, serverTypes or locations")
    ]) (attrNames it.bots) ++ [ (unless (!it.enabled || it.host != null) "host is not named") ]);
    Fleet = it: let home = it.hosts.${it.cattle.host}; in if it.cattle.host == null then null else first [
      (unless (it.hosts ? ${it.cattle.host}) "cattle.host: there is no such host")
      (unless (!it.cattle.enabled || home.tailnet.mode != "none") "cattle.host is not on the tailnet")
      (unless (all (persona: all (secret: home.secrets ? ${secret}) (attrValues persona.secrets)) (attrValues it.cattle.personas))
        "cattle.personas: cattle.host has no such secret")
    ];
  };
}
