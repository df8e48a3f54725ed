# clawdlets-ops for Nix: the modules of a host, what a project's flake calls, a template, the Python parts as packages.
# Refer to it, and to a project, as github:, git+https:// or git+file://. Any other way of naming a folder copies what git
# ignores, private keys among it, into the world-readable /nix/store.
{
  description = "Fleets of bots on Hetzner Cloud and NixOS, deployed and proved to be closed";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-25.11";
    sops-nix = { url = "github:Mic92/sops-nix/56b24064fdcaedca53553b1a6d607fd23b613a24"; inputs.nixpkgs.follows = "nixpkgs"; };
    disko = { url = "github:nix-community/disko/878ec37d6a8f52c6c801d0e2a2ad554c75b9353c"; inputs.nixpkgs.follows = "nixpkgs"; };
  };

  outputs = { self, nixpkgs, sops-nix, disko }:
    let
      inherit (nixpkgs) lib;
      clawdlets = import ./nix { inherit sops-nix disko; };
      inherit (import ./nix/fleet.nix) systems;
      each = f: lib.genAttrs systems (system: f nixpkgs.legacyPackages.${system});
      example = clawdlets.mkHosts lib.nixosSystem ./nix/checks/fleet/clawdlets.json;
      image = system: lib.nixosSystem { modules = clawdlets.cattleModules ++ [ { nixpkgs.hostPlatform = system; } ]; };
    in
    {
      lib = { inherit (clawdlets) mkHosts cattleModules; };
      nixosModules = {
        default.imports = clawdlets.hostModules;
        cattle.imports = clawdlets.cattleModules;
      };
      templates.default = { path = ./nix/template; description = "A fleet of bot hosts (clawdlets init makes the whole project)"; };
      packages = each (pkgs: let parts = import ./nix/packages { inherit pkgs; }; in parts // { default = parts.clawdlets; });
      # Every option that is set exists and has its type; nothing is built but the small parts.
      checks = each (pkgs: {
        inherit (self.packages.${pkgs.stdenv.hostPlatform.system}) clawdlets-host-tools;
        hosts = pkgs.writeText "hosts" (lib.concatStringsSep "\n" (map (name:
          builtins.unsafeDiscardStringContext example.${name}.config.system.build.toplevel.drvPath) (lib.attrNames example)));
        cattle = pkgs.writeText "cattle" (builtins.unsafeDiscardStringContext (image pkgs.stdenv.hostPlatform.system).config.system.build.toplevel.drvPath);
      });
    };
}
