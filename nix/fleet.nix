# The fleet file, read as Python reads it.
let
  inherit (builtins) concatMap concatStringsSep fromJSON isAttrs isList listToAttrs map mapAttrs readFile removeAttrs;
  schema = import ./schema.nix (fromJSON (readFile ../fleet/clawdlets.schema.json));
  withoutComments = value:
    if isAttrs value then mapAttrs (_: withoutComments) (removeAttrs value [ "$comment" ])
    else if isList value then map withoutComments value
    else value;
in
schema // {
  # The whole fleet in `file`, with every default; throws with each fault's key path.
  load = file:
    let
      raw = withoutComments (removeAttrs (fromJSON (readFile file)) [ "$schema" ]);
      found = schema.faults raw;
    in
    if found == [ ] then schema.fill raw
    else throw (concatStringsSep "\n  " ([ "${toString file}: is not an acceptable fleet:" ] ++ map (fault: "${fault.path}: ${fault.what}") found));
}
