# The plain files that Python reads too.
rec {
  path = name: ../clawdlets_ops/hostfiles + "/${name}";
  text = name: builtins.readFile (path name);
  data = name: builtins.fromJSON (text name);
  paths = data "paths.json";
  tailnet = data "tailnet.json";
  # A path of paths.json as environment.etc names it: without /etc/.
  etc = part: builtins.substring 5 (-1) part.path;
  # Every @NAME@ of a template is replaced, in one go.
  filled = values: builtins.replaceStrings (map (name: "@${name}@") (builtins.attrNames values)) (builtins.attrValues values);
}
