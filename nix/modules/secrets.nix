# One sops file for each secret, decrypted on the host with its own age key. The store holds paths, which are strings.
{ config, lib, pkgs, ... }:
let
  c = config.clawdlets;
  inherit (import ../hostfiles.nix) paths;
  inherit (import ../fleet.nix) wiringDefaults;
  tools = import ../packages/host-tools.nix { inherit pkgs; };
  file = name: "${paths.secretsDirs.path}/${config.networking.hostName}/${name}.yaml";
  hash = name: { sopsFile = file name; neededForUsers = true; };
  botsWith = name: lib.filter (bot: lib.elem name c.bots.${bot}.secrets) (lib.attrNames c.bots);
  owners = lib.unique (lib.filter (owner: !lib.elem owner [ "root" "admin" "breakglass" ]) (map (wiring: wiring.owner) (lib.attrValues c.secrets)));
  groups = lib.unique (lib.filter (group: group != null) (map (wiring: wiring.group) (lib.attrValues c.secrets)));
in
{
  sops = {
    age.keyFile = paths.hostAgeKey.path;
    age.generateKey = false; # one that is made here could decrypt nothing
    age.sshKeyPaths = [ ]; # the age key is the only key
    gnupg.sshKeyPaths = [ ];
    validateSopsFiles = false; # they are not in the store
    useSystemdActivation = true; # a unit: it shows when it fails, and others can wait for it
    secrets = {
      admin_password_hash = hash "admin_password_hash";
      breakglass_password_hash = hash "breakglass_password_hash";
    } // lib.optionalAttrs (c.tailnet.mode == "tailscale") {
      tailscale_auth_key = { sopsFile = file "tailscale_auth_key"; inherit (wiringDefaults) owner mode; };
    } // lib.mapAttrs (name: wiring: {
      sopsFile = file name;
      inherit (wiring) owner mode;
      restartUnits = map (bot: "clawdlets-bot-${bot}.service") (botsWith name);
    } // lib.optionalAttrs (wiring.group != null) { inherit (wiring) group; }) c.secrets;
  };
  # A set that was never proved (see clawdlets-sync) is taken back before it is decrypted.
  systemd.services.sops-install-secrets.serviceConfig.ExecStartPre = [ "-${tools}/bin/clawdlets-sync settle" ];
  # Whoever owns a secret is there.
  users.groups = lib.genAttrs (lib.unique (owners ++ groups)) (_: { });
  users.users = lib.genAttrs owners (owner: { isSystemUser = lib.mkDefault true; group = lib.mkDefault owner; });
}
