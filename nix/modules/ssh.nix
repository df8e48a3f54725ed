# SSH by key alone: keys from the declaration, one host key, delivered with the payload. Where it may be reached from is the
# firewall's business (clawdlets-exposure).
{ config, lib, ... }:
let
  c = config.clawdlets;
  sshd = (import ../hostfiles.nix).data "sshd.json";
in
{
  services.openssh = {
    enable = true;
    openFirewall = false;
    authorizedKeysInHomedir = false; # nobody leaves a key behind in a home
    hostKeys = [ { type = "ed25519"; path = sshd.hostKey; } ];
    sftpServerExecutable = sshd.sftp;
    inherit (sshd) settings;
  };
  users.users.admin.openssh.authorizedKeys.keys = c.sshAuthorizedKeys;
  assertions = [ {
    assertion = config.users.users.admin.openssh.authorizedKeys.keys != [ ];
    message = "no admin key is known here: the file in provisioning.sshPubkeyFile is not in the repository, so give its line in sshAuthorizedKeys";
  } ];
}
