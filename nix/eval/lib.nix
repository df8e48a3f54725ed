# A stand-in for nixpkgs' lib and module system: just enough to evaluate our own modules with any Nix and no nixpkgs. It shows
# that they parse, merge and give the values they should, and it refuses unknown keys and wrong values below `clawdlets`. It
# knows neither NixOS' own options nor their types: `nix flake check` does, where there is nixpkgs.
let
  inherit (builtins) all any attrNames attrValues concatLists concatMap elem filter foldl' head isAttrs isFunction isList isString
    length listToAttrs map mapAttrs removeAttrs zipAttrsWith;
  tagged = value: isAttrs value && value ? _type;

  lib = rec {
    mkIf = condition: content: { _type = "if"; inherit condition content; };
    mkMerge = contents: { _type = "merge"; inherit contents; };
    mkOverride = priority: content: { _type = "override"; inherit priority content; };
    mkForce = mkOverride 50;
    mkDefault = mkOverride 1000;
    mkOption = option: option // { _type = "option"; };
    mkOptionType = type: type;
    mergeEqualOption = null;
    types = {
      nullOr = of: { inherit of; maybe = true; };
      attrsOf = of: { inherit of; };
      listOf = _: { };
      submodule = module: { inherit (module) options; };
      str = { };
    };
    optional = condition: one: if condition then [ one ] else [ ];
    optionals = condition: several: if condition then several else [ ];
    optionalAttrs = condition: attrs: if condition then attrs else { };
    optionalString = condition: text: if condition then text else "";
    importJSON = file: builtins.fromJSON (builtins.readFile file);
    inherit (builtins) attrNames attrValues concatStringsSep elem filter head mapAttrs replaceStrings;
    nameValuePair = name: value: { inherit name value; };
    mapAttrs' = f: attrs: listToAttrs (map (name: f name attrs.${name}) (attrNames attrs));
    mapAttrsToList = f: attrs: map (name: f name attrs.${name}) (attrNames attrs);
    filterAttrs = keep: attrs: listToAttrs (concatMap (name: if keep name attrs.${name} then [ (nameValuePair name attrs.${name}) ] else [ ]) (attrNames attrs));
    genAttrs = names: f: listToAttrs (map (name: nameValuePair name (f name)) names);
    concatMapStrings = f: several: builtins.concatStringsSep "" (map f several);
    unique = foldl' (seen: one: if elem one seen then seen else seen ++ [ one ]) [ ];
    hasPrefix = start: text: builtins.substring 0 (builtins.stringLength start) text == start;
    removePrefix = start: text: if hasPrefix start text then builtins.substring (builtins.stringLength start) (-1) text else text;
  };

  # A module's content, pushed below the conditions around it.
  push = content:
    if !tagged content then [ content ]
    else if content._type == "merge" then concatMap push content.contents
    else if content._type == "if" then map (mapAttrs (_: lib.mkIf content.condition)) (push content.content)
    else [ content ];
  discharge = one:
    if !tagged one then [ { priority = 100; value = one; } ]
    else if one._type == "if" then (if one.condition then discharge one.content else [ ])
    else if one._type == "merge" then concatMap discharge one.contents
    else if one._type == "override" then map (found: found // { inherit (one) priority; }) (discharge one.content)
    else [ { priority = 100; value = one; } ];
  merge = path: definitions:
    let
      found = concatMap discharge definitions;
      best = foldl' (lowest: one: if one.priority < lowest then one.priority else lowest) 9999 found;
      values = map (one: one.value) (filter (one: one.priority == best) found);
    in
    if values == [ ] then null
    else if all (value: isAttrs value && !tagged value) values then together path values
    else if all isList values then concatLists values
    else if length values > 1 && any (value: value != head values) values then throw "${path}: two definitions that differ"
    else head values;
  # What only conditions that do not hold define is null: whether it is there could not be told without looking at it.
  together = path: values: mapAttrs (name: merge "${path}.${name}") (zipAttrsWith (_: found: found) values);

  # The values of an option tree: defaults filled in, unknown keys and bad values refused with their path.
  fill = path: options: given:
    let unknown = filter (name: !(options ? ${name})) (attrNames given); in
    if unknown != [ ] then throw "The option `${path}.${head unknown}' does not exist."
    else mapAttrs (name: option:
      let at = "${path}.${name}"; in
      if !tagged option then fill at option (given.${name} or { })
      else typed at option.type (given.${name} or (option.default or (throw "The option `${at}' is used but not defined.")))) options;
  typed = path: type: value:
    if (type.maybe or false) && value == null then null
    else if type ? maybe then typed path type.of value
    else if type ? options then fill path type.options value
    else if type ? of then mapAttrs (name: typed "${path}.${name}" type.of) value
    else if type ? check && !type.check value then throw "A definition for option `${path}' is not of its type."
    else value;
in
{
  inherit lib;
  # `complete raw` is what NixOS' modules add to what ours define and read again.
  evaluate = { modules, pkgs, complete ? (_: { }) }:
    let
      args = { inherit lib pkgs config; modulesPath = "/modules"; };
      load = module: if isFunction module then module args else if isAttrs module then module else load (import module);
      flat = module: let loaded = load module; in [ loaded ] ++ concatMap flat (filter (one: !isString one) (loaded.imports or [ ]));
      loaded = concatMap flat modules;
      content = module: if module ? config || module ? options then module.config or { } else removeAttrs module [ "imports" ];
      raw = together "" (concatMap (module: push (content module)) loaded);
      options = foldl' (tree: module: tree // (module.options.clawdlets or { })) { } loaded;
      config = raw // { clawdlets = fill "clawdlets" options (raw.clawdlets or { }); } // complete raw;
    in
    { inherit config; failed = map (one: one.message) (filter (one: !one.assertion) (config.assertions or [ ])); };
}
