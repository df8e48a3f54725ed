# The plain files that Python reads too.
rec {
  path = name: ../clawdlets_ops/hostfiles + "/${name}";
  text = name: builtins.readFile (path name);
  data = name: builtins.fromJSON (text name);
  paths = data "paths.json";
  tailnet = data "tailnet.json";
  # Every @NAME@ of a template is replaced, in one go.
  filled = values: builtins.replaceStrings (map (name: "@${name}@") (builtins.attrNames values)) (builtins.attrValues values);
}
