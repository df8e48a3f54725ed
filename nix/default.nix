# What a project's flake calls.
{ sops-nix, disko }:
let
  fleet = import ./fleet.nix;
  inherit (import ./hostfiles.nix) etc paths;
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
  declared = root: it: name: let host = it.hosts.${name}; in {
    networking.hostName = name;
    clawdlets = host;
    users.users.admin.openssh.authorizedKeys.keys =
      builtins.filter (line: !builtins.elem (body line) (map body (host.sshAuthorizedKeys or [ ]))) (ownKey root host);
  } // (if (it.cattle.host or null) == name && host.orchestrator.enable then ordersCattle root it.cattle host else { });

  # What the orchestrator that orders cattle reads of it, and the port where machines ask for their environment. Where cattle is not
  # enabled any more, it has to know that: it ends what runs.
  ordersCattle = root: cattle: host: let section = builtins.toJSON cattle; personas = root + "/fleet/personas"; in {
    environment.etc = {
      ${etc paths.cattleDeclared} = { inherit (paths.cattleDeclared) mode; text = section; };
    } // (if cattle.enabled then {
      ${etc paths.tailnetPorts} = { inherit (paths.tailnetPorts) mode; text = "${toString host.orchestrator.bootstrapPort}\n"; };
    } else { }) // (if cattle.enabled && builtins.pathExists personas then { ${etc paths.cattlePersonas}.source = personas; } else { });
    systemd.services.clf-orchestrator.restartTriggers = [ section ];
    systemd.services.clawdlets-firewall.restartTriggers = [ "${toString host.orchestrator.bootstrapPort} ${builtins.toJSON cattle.enabled}" ];
  };

  # nixosConfigurations of every host in the fleet file (PROJECT/fleet/clawdlets.json). Throws when Python would refuse it.
  mkHosts = nixosSystem: file:
    let it = fleet.load file; in
    builtins.mapAttrs (name: _: nixosSystem { modules = hostModules ++ [ (declared (dirOf (dirOf file)) it name) ]; }) it.hosts;
}
