# A host of a fleet file, or the cattle image, evaluated without nixpkgs. STAND-INS: lib, the module system, pkgs (names only),
# sops-nix and disko (no modules; their options are free), and what NixOS adds.
let
  inherit (import ./lib.nix) lib evaluate;
  named = name: { outPath = "/nix/store/${name}"; };
  pkgs = {
    inherit lib;
    runCommand = name: _: _: "/nix/store/${name}";
    python3 = named "python3" // { pkgs = { buildPythonApplication = _: "/nix/store/clawdlets-ops"; hatchling = ""; click = ""; }; };
  } // lib.genAttrs [ "bash" "curl" "gawk" "iproute2" "nftables" "sops" "squid" "util-linux" ] (name: "/nix/store/${name}");
  clawdlets = import ../default.nix {
    sops-nix.nixosModules.sops = { };
    disko.nixosModules.disko = { };
  };
  # What sops-nix adds.
  complete = raw: {
    sops = raw.sops // { secrets = lib.mapAttrs (name: secret: secret // {
      path = if secret.neededForUsers or false then "/run/secrets-for-users/${name}" else "/run/secrets/${name}";
    }) raw.sops.secrets; };
  };
in
{
  host = root: it: name: evaluate { modules = clawdlets.hostModules ++ [ (clawdlets.declared root it name) ]; inherit pkgs complete; };
  cattle = evaluate { modules = clawdlets.cattleModules; inherit pkgs; };
  fleet = import ../fleet.nix;
}
