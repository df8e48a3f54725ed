# Networks in CIDR form as Python's ipaddress reads them: strings of zeros and ones, as long as the prefix.
let
  inherit (builtins) any bitAnd concatStringsSep elemAt filter foldl' fromJSON genList head isList isString length match split stringLength substring;

  bits = width: number: concatStringsSep "" (genList (at:
    let weight = foldl' (power: _: power * 2) 1 (genList (x: x) (width - 1 - at)); in
    if bitAnd number weight != 0 then "1" else "0") width);
  decimal = text: let digits = head (match "0*([0-9]+)" text); in fromJSON digits;
  hexDigits = { "0" = 0; "1" = 1; "2" = 2; "3" = 3; "4" = 4; "5" = 5; "6" = 6; "7" = 7; "8" = 8; "9" = 9; a = 10; b = 11; c = 12; d = 13; e = 14; f = 15;
    A = 10; B = 11; C = 12; D = 13; E = 14; F = 15; };
  hex = text: foldl' (sum: at: sum * 16 + hexDigits.${substring at 1 text}) 0 (genList (x: x) (stringLength text));
  parts = separator: text: filter isString (split separator text);

  octet = text: if match "0|[1-9][0-9]{0,2}" text != null && decimal text <= 255 then bits 8 (decimal text) else null;
  v4 = text: let found = map octet (parts "[.]" text); in
    if length found == 4 && !any isNull found then concatStringsSep "" found else null;
  isNull = value: value == null;

  # The groups of one side of "::", the last of which may be an IPv4 address.
  groups = last: text:
    if text == "" then [ ] else
    let found = parts ":" text; count = length found; final = elemAt found (count - 1); in
    map (group: if match "[0-9A-Fa-f]{1,4}" group != null then bits 16 (hex group) else null)
      (if last && match ".*[.].*" final != null then genList (elemAt found) (count - 1) else found)
    ++ (if last && match ".*[.].*" final != null then
      (let tail = v4 final; in if tail == null then [ null ] else [ (substring 0 16 tail) (substring 16 16 tail) ]) else [ ]);
  zeros = count: concatStringsSep "" (genList (_: "0") count);
  v6 = text:
    let
      sides = parts "::" text;
      left = groups (length sides == 1) (head sides);
      right = if length sides == 2 then groups true (elemAt sides 1) else [ ];
      count = length left + length right;
      all = concatStringsSep "" (left ++ genList (_: zeros 16) (8 - count) ++ right);
    in
    if length sides > 2 || any isNull (left ++ right) || (length sides == 1 && count != 8) || (length sides == 2 && count > 7)
    then null else all;

  # { version, prefix } of one network; null when it is none, or has bits set behind its prefix (a /0 may).
  parse = text:
    let
      said = match "([^/]*)(/([0-9]+))?" text;
      address = head said;
      version = if match ".*:.*" address != null then 6 else 4;
      all = if version == 6 then v6 address else v4 address;
      size = if version == 6 then 128 else 32;
      given = elemAt said 2;
      short = given == null || stringLength (head (match "0*([0-9]+)" given)) <= 3;
      prefix = if given == null then size else decimal given;
    in
    if said == null || all == null || !short || prefix > size then null
    else if prefix != 0 && substring prefix size all != zeros (size - prefix) then null
    else { inherit version; prefix = substring 0 prefix all; };

  starts = prefix: text: substring 0 (stringLength prefix) text == prefix;
  covered = at: networks:
    let inside = filter (starts at) networks; in
    any (network: starts network at) networks || (inside != [ ] && covered (at + "0") inside && covered (at + "1") inside);
  # Whether these networks, taken together, hold all of some network with a shorter prefix than `limit`.
  wide = limit: networks: any (network:
    stringLength network < limit || covered (substring 0 (limit - 1) network) networks) networks;
in
{
  inherit parse;
  worldOpen = limits: networks: any (version:
    wide limits.${version} (map (network: network.prefix) (filter (network: toString network.version == version) networks))) [ "4" "6" ];
}
