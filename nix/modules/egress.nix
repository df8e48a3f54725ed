# The egress policy and the units of the bots. Rules, proxy and units come from the same templates as Python's.
{ config, lib, pkgs, ... }:
let
  c = config.clawdlets;
  hostfiles = import ../hostfiles.nix;
  egress = import ../egress.nix { inherit lib c; };
  unit = template: { unitConfig = template.Unit; wantedBy = template.Install.WantedBy; };
  rules = egress.templates."clawdlets-egress.service";
  proxy = egress.templates."clawdlets-egress-proxy.service";
  bot = egress.templates."clawdlets-bot-@BOT@.service";
  fill = values: content:
    if builtins.isString content then hostfiles.filled values content
    else if builtins.isList content then map (fill values) content
    else if builtins.isAttrs content then lib.mapAttrs (_: fill values) content
    else content;
in
{
  environment.etc = lib.mapAttrs' (name: text: lib.nameValuePair "${egress.folder}/${name}" { inherit text; }) egress.files;
  users.groups = { ${egress.proxyUser} = { }; } // lib.mapAttrs' (name: _: lib.nameValuePair "bot-${name}" { }) c.bots;
  users.users = {
    ${egress.proxyUser} = { isSystemUser = true; group = egress.proxyUser; };
  } // lib.mapAttrs' (name: _: lib.nameValuePair "bot-${name}" { isSystemUser = true; group = "bot-${name}"; }) c.bots;
  systemd.services = {
    clawdlets-egress = unit rules // {
      restartTriggers = [ egress.files."rules.nft" ];
      serviceConfig = fill { NFT = "${pkgs.nftables}/bin/nft"; } rules.Service;
    };
  } // lib.optionalAttrs egress.proxy {
    clawdlets-egress-proxy = unit proxy // {
      restartTriggers = lib.attrValues egress.files;
      serviceConfig = hostfiles.data "hardening.json" // fill { SQUID = "${pkgs.squid}/bin/squid"; } proxy.Service;
    };
  } // lib.mapAttrs' (name: declared:
    let
      line = egress.line name;
      filled = fill { BOT = name; } bot;
      wanted = lib.optionalAttrs (egress.proxied line) {
        Wants = [ "clawdlets-egress-proxy.service" ];
        After = bot.Unit.After ++ [ "clawdlets-egress-proxy.service" ];
      };
    in lib.nameValuePair "clawdlets-bot-${name}" (unit (filled // { Unit = filled.Unit // wanted; }) // {
      serviceConfig = hostfiles.data "hardening.json"
        // lib.optionalAttrs (egress.proxied line) (hostfiles.data "confined.json")
        // filled.Service
        // {
          MemoryMax = "${toString declared.limits.memoryMaxMb}M";
          TasksMax = declared.limits.tasksMax;
          Environment = egress.assignments (declared.environment // egress.environment line);
        }
        // lib.optionalAttrs (declared.limits.cpuQuotaPercent != null) { CPUQuota = "${toString declared.limits.cpuQuotaPercent}%"; }
        // lib.optionalAttrs (declared.execStart != null) { ExecStart = declared.execStart; };
    })) c.bots;
}
