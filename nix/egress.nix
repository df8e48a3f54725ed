# What may leave a host, as clawdlets_ops/egress.py has it, from the same templates: a test holds that every file is the same.
{ lib, c }:
let
  hostfiles = import ./hostfiles.nix;
  data = hostfiles.data "egress.json";
  templates = hostfiles.data "units.json";
  given = value: fallback: if value == null then fallback else value;
  names = lib.attrNames c.bots;
  bots = builtins.genList (place:
    let name = builtins.elemAt names place; own = c.bots.${name}.egress; in {
      name = "bot-${name}";
      mode = given own.mode c.egress.mode;
      domains = given own.allowedDomains c.egress.allowedDomains;
      port = toString (data.firstBotPort + place);
    }) (builtins.length names);
  lines = [ { name = "host"; inherit (c.egress) mode; domains = c.egress.allowedDomains; port = toString data.hostPort; } ] ++ bots;
  proxied = line: line.mode == "proxy-allowlist";
  throughProxy = lib.filter proxied lines;
  confined = lib.filter proxied bots;
  dropsMail = c.egress.mode != "none";
  elements = several: if several == [ ] then "" else "elements = { ${lib.concatStringsSep ", " several} }";
  quoted = several: elements (map (line: "\"${line.name}\"") several);
  each = template: lib.concatStringsSep "\n" (map (line: hostfiles.filled { PORT = line.port; NAME = line.name; } data.squid.${template}) throughProxy);
  escaped = lib.replaceStrings [ "\\" "\"" "%" ] [ "\\\\" "\\\"" "%%" ];
in
rec {
  proxy = throughProxy != [ ];
  proxyUser = data.proxyUser;
  folder = lib.removePrefix "/etc/" data.folder;
  line = name: lib.head (lib.filter (line: line.name == "bot-${name}") bots);
  inherit proxied templates;
  environment = line: if proxied line then lib.mapAttrs (_: hostfiles.filled { PORT = line.port; }) data.environment else { };
  assignments = values: map (name: "\"${name}=${escaped values.${name}}\"") (lib.attrNames values);
  files = {
    mode = "${c.egress.mode}\n";
    "rules.nft" = hostfiles.filled {
      CONFINED = quoted confined;
      PROXY_PORT = elements (map (line: "\"${line.name}\" . ${line.port}") confined);
      MAY_MAIL = quoted (lib.filter (line: dropsMail && line.mode == "none") bots);
      NO_MAIL = quoted (lib.filter (line: !dropsMail && line.mode != "none") bots);
      INSIDE4 = lib.concatStringsSep ", " data.inside4;
      INSIDE6 = lib.concatStringsSep ", " data.inside6;
      PROXY_USER = data.proxyUser;
      OUTPUT = lib.concatStringsSep "\n    " data.rules.${c.egress.mode}.output;
      FORWARD = lib.concatStringsSep "\n    " data.rules.${c.egress.mode}.forward;
    } (hostfiles.text "egress.nft");
  } // lib.optionalAttrs proxy ({
    "squid.conf" = hostfiles.filled {
      PORTS = each "port";
      INSIDE4 = lib.concatStringsSep " " data.inside4;
      INSIDE6 = lib.concatStringsSep " " data.inside6;
      LISTS = each "list";
      DENY = each "deny";
      ALLOW = each "allow";
    } (hostfiles.text "squid.conf");
  } // builtins.listToAttrs (map (line: { name = "${line.name}.domains"; value = lib.concatMapStrings (domain: domain + "\n") line.domains; }) throughProxy));
}
