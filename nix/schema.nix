# The fleet file's JSON Schema, which Python writes from its models: what is wrong with a value, the value with its defaults,
# and the tree of NixOS options. No field, default, enum or pattern is written here.
schema:
let
  inherit (builtins) all attrNames attrValues concatMap concatStringsSep elem elemAt filter fromJSON head isAttrs isBool isInt isList
    isString length listToAttrs mapAttrs match removeAttrs replaceStrings stringLength toJSON;

  resolve = part: if part ? "$ref" then resolve schema."$defs".${head (match "#/[$]defs/(.*)" part."$ref")} else part;
  # POSIX has no groups without capture, no \x, and no escapes in brackets; the rest of the patterns means the same to both
  # (a test holds that). No Nix string has a NUL in it.
  fits = pattern: text: match (posix pattern) text != null;
  posix = replaceStrings ([ "(?:" "[A-Za-z0-9.\\[\\]:-]" ] ++ map (code: "\\x${code}") codes)
    ([ "(" "[][A-Za-z0-9.:-]" ] ++ map (code: fromJSON "\"\\u00${if code == "00" then "01" else code}\"") codes);
  codes = [ "00" "08" "0a" "1f" "7f" ];
  ours = keys: filter (key: key != "$comment" && key != "$schema") keys;
  properties = part: removeAttrs (part.properties or { }) [ "$comment" "$schema" ];
  # One of two is null: the other one. (The only kind of anyOf there is.)
  present = part: resolve (head (filter (one: (one.type or "") != "null") part.anyOf));
  # What the values of a map are.
  itemOf = part: head (attrValues (part.patternProperties or { }) ++ [ (part.additionalProperties or { }) ]);
  enumerate = items: builtins.genList (at: { at = toString at; value = elemAt items at; }) (length items);
  below = path: key: if path == "" then key else "${path}.${key}";
  fault = path: what: [ { path = if path == "" then "(top)" else path; inherit what; } ];

  number = part: path: value:
    if !isInt value then fault path "is no whole number"
    else if (part ? minimum && value < part.minimum) || (part ? maximum && value > part.maximum)
      || (part ? exclusiveMinimum && value <= part.exclusiveMinimum) || (part ? exclusiveMaximum && value >= part.exclusiveMaximum)
    then fault path "is out of range" else [ ];
  text = part: path: value:
    if !isString value then fault path "is no text"
    else if (part ? maxLength && stringLength value > part.maxLength) || (part ? minLength && stringLength value < part.minLength)
    then fault path "is too long or too short"
    else if part ? pattern && !(fits part.pattern value) then fault path "does not match ${part.pattern}" else [ ];
  # An entry that is no good does not count, as it does not for pydantic.
  several = part: path: value:
    let found = map (one: faults (part.items or { }) (below path one.at) one.value) (enumerate value); good = length (filter (one: one == [ ]) found); in
    if !isList value then fault path "is no list"
    else (if good < (part.minItems or 0) || good > (part.maxItems or 1000000) then fault path "has too few or too many entries" else [ ])
      ++ concatMap (one: one) found;
  object = part: path: value:
    let
      known = properties part;
      patterns = part.patternProperties or { };
      keys = ours (attrNames value);
      title = part.title or "";
      one = key: let found = shape key; in if found != [ ] then found else verdict (below path key) (rules.fields.${title}.${key} or (_: null)) (filled known.${key} or { } value.${key});
      shape = key:
        let fitting = filter (pattern: fits pattern key) (attrNames patterns); in
        if known ? ${key} then faults known.${key} (below path key) value.${key}
        else if fitting != [ ] then faults patterns.${head fitting} (below path key) value.${key}
        else if isAttrs (part.additionalProperties or false) then faults part.additionalProperties (below path key) value.${key}
        else if patterns != { } then fault (below path key) "is no name that may stand here"
        else fault (below path key) "unknown key";
      members = concatMap one keys
        ++ concatMap (key: if value ? ${key} then [ ] else fault (below path key) "is required") (part.required or [ ])
        ++ (if length keys < (part.minProperties or 0) || length keys > (part.maxProperties or 1000000)
          then fault path "has too few or too many entries" else [ ]);
    in
    if !isAttrs value then fault path "is no object"
    else if members != [ ] then members
    else verdict path (rules.models.${title} or (_: null)) (filled part value);
  rules = import ./rules.nix { facts = schema."x-rules"; inherit fits; };
  verdict = path: rule: value: let what = rule value; in if what == null then [ ] else fault path what;
  variant = part: path: value:
    let tag = value.${part.discriminator.propertyName} or null; in
    if !isAttrs value then fault path "is no object"
    else if !(isString tag && part.discriminator.mapping ? ${tag}) then fault (if value ? ${part.discriminator.propertyName} then below path part.discriminator.propertyName else path) "is none of ${concatStringsSep ", " (attrNames part.discriminator.mapping)}"
    else faults { "$ref" = part.discriminator.mapping.${tag}; } (below path tag) value;

  # What is wrong with `value`: a list of { path, what }. Values are not repeated.
  faults = unresolved: path: value:
    let part = resolve unresolved; in
    if part ? discriminator then variant part path value
    else if part ? anyOf then (if value == null then [ ] else faults (present part) path value)
    else if part ? const then (if value == part.const && builtins.typeOf value == builtins.typeOf part.const then [ ] else fault path "must be ${toJSON part.const}")
    else if part ? enum then (if elem value part.enum then [ ] else fault path "is none of ${concatStringsSep ", " part.enum}")
    else if part.type or "" == "string" then text part path value
    else if part.type or "" == "integer" then number part path value
    else if part.type or "" == "boolean" then (if isBool value then [ ] else fault path "is neither true nor false")
    else if part.type or "" == "array" then several part path value
    else if part.type or "" == "object" then object part path value
    else throw "${path}: this schema is in no form that is known here: ${toJSON part}";

  # `value`, which has no faults, with its defaults.
  filled = unresolved: value:
    let part = resolve unresolved; in
    if part ? discriminator then filled { "$ref" = part.discriminator.mapping.${value.${part.discriminator.propertyName}}; } value
    else if part ? anyOf then (if value == null then null else filled (present part) value)
    else if properties part != { } then mapAttrs (key: one: filled one (value.${key} or (default one))) (properties part)
    else if part.type or "" == "object" then mapAttrs (_: filled (itemOf part)) (removeAttrs value [ "$comment" ])
    else if part.type or "" == "array" then map (filled (part.items or { })) value
    else value;
  default = one: one.default or (if (resolve one).type or "" == "object" then { } else null);

  # NixOS options below an object. Where a default is missing the option has to be set.
  options = lib: unresolved: mapAttrs (_: option lib) (properties (resolve unresolved));
  option = lib: unresolved:
    let
      part = resolve unresolved;
      leaf = one: lib.mkOptionType {
        name = "of the fleet file";
        description = (resolve one).description or (resolve one).type or "a value of the fleet file";
        check = value: faults one "" value == [ ];
        merge = lib.mergeEqualOption;
      };
      typeOf = one: let it = resolve one; in
        if it ? anyOf then lib.types.nullOr (typeOf (present it))
        else if properties it != { } then lib.types.submodule { options = options lib it; }
        else if it.type or "" == "object" then lib.types.attrsOf (typeOf (itemOf it))
        else leaf one;
    in
    if properties part != { } then options lib part
    else lib.mkOption ({ type = typeOf part; description = unresolved.description or part.description or "See docs/reference/options.md."; }
      // (if unresolved ? default then { inherit (unresolved) default; } else if part.type or "" == "object" then { default = { }; } else { }));
in
{
  inherit filled fits options;
  faults = faults schema "";
  hostFaults = faults { "$ref" = "#/$defs/Host"; };
  systems = schema."$defs".Host.properties.system.enum;
  wiringDefaults = filled { "$ref" = "#/$defs/SecretWiring"; } { };
  hostDefaults = filled { "$ref" = "#/$defs/Host"; } { };
  hostOptions = lib: options lib { "$ref" = "#/$defs/Host"; };
  fill = filled schema;
}
