# What a project's flake calls.
{ sops-nix, disko }:
let
  fleet = import ./fleet.nix;
  # The operator's own key, where the repository has it: a flake sees what git tracks, and nothing of the home.
  ownKey = root: host:
    let name = host.provisioning.sshPubkeyFile or ""; file = root + "/${name}"; in
    if name == "" || builtins.substring 0 1 name == "~" || builtins.substring 0 1 name == "/" || !builtins.pathExists file then [ ]
    else [ (builtins.head (builtins.filter builtins.isString (builtins.split "\n" (builtins.readFile file)))) ];
  words = line: builtins.filter builtins.isString (builtins.split " " line);
  body = line: builtins.elemAt (words line) 1;
in
rec {
  hostModules = [
    sops-nix.nixosModules.sops disko.nixosModules.disko
    ./modules/options.nix ./modules/host.nix ./modules/ssh.nix ./modules/tailscale.nix ./modules/secrets.nix
    ./modules/egress.nix ./modules/orchestrator.nix ./modules/updates.nix
  ];
  cattleModules = [ disko.nixosModules.disko ./modules/cattle.nix ];

  # The modules that one host of the (checked) fleet is made of, besides hostModules. `root` is the project's folder.
  declared = root: name: host: {
    networking.hostName = name;
    clawdlets = host;
    users.users.admin.openssh.authorizedKeys.keys =
      builtins.filter (line: !builtins.elem (body line) (map body (host.sshAuthorizedKeys or [ ]))) (ownKey root host);
  };

  # nixosConfigurations of every host in the fleet file (PROJECT/fleet/clawdlets.json). Throws when Python would refuse it.
  mkHosts = nixosSystem: file:
    builtins.mapAttrs (name: host: nixosSystem { modules = hostModules ++ [ (declared (dirOf (dirOf file)) name host) ]; })
      (fleet.load file).hosts;
}
