# The hosts of fleet/clawdlets.json, which `clawdlets init` writes beside this file with everything else that a project has.
{
  inputs = {
    clawdlets.url = "github:OWNER/clawdlets-ops";
    nixpkgs.follows = "clawdlets/nixpkgs";
  };
  outputs = { nixpkgs, clawdlets, ... }: {
    nixosConfigurations = clawdlets.lib.mkHosts nixpkgs.lib.nixosSystem ./fleet/clawdlets.json;
  };
}
