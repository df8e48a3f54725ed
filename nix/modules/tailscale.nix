# The tailnet. NixOS' own authKeyFile would put the key on a command line; here tailscale reads the file.
{ config, lib, pkgs, ... }:
let
  c = config.clawdlets;
  hostfiles = import ../hostfiles.nix;
  tools = import ../packages/host-tools.nix { inherit pkgs; };
in
lib.mkIf (c.tailnet.mode == "tailscale") {
  services.tailscale = { enable = true; openFirewall = false; port = hostfiles.tailnet.udpPort; interfaceName = hostfiles.tailnet.interface; useRoutingFeatures = "none"; };
  # Its folder in /run outlives a restart: when it goes, the wall that hides it from running bots goes with it.
  systemd.services.tailscaled.serviceConfig = hostfiles.tailnet.service;
  environment.etc = lib.mkIf c.tailnet.allowUdpIngress { "clawdlets/tailscale".text = ""; };
  systemd.services.tailscaled-autoconnect = {
    description = "Join the tailnet";
    wantedBy = [ "multi-user.target" ];
    wants = [ "tailscaled.service" "network-online.target" ];
    requires = [ "sops-install-secrets.service" ];
    after = [ "tailscaled.service" "sops-install-secrets.service" "network-online.target" ];
    unitConfig.StartLimitIntervalSec = 0;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      ExecStart = "${tools}/bin/clawdlets-join ${config.networking.hostName} ${config.sops.secrets.tailscale_auth_key.path}";
      TimeoutStartSec = 90;
      Restart = "on-failure";
      RestartSec = 10;
    };
  };
  # A node whose key runs out is off the tailnet, and this host is reached no other way: a failed unit says so in time.
  systemd.services.clawdlets-tailnet-expiry = {
    description = "The key of this tailnet node lasts";
    serviceConfig = { Type = "oneshot"; ExecStart = "${tools}/bin/clawdlets-key-expiry ${toString hostfiles.tailnet.minKeyLifeDays}"; };
  };
  systemd.timers.clawdlets-tailnet-expiry = {
    wantedBy = [ "timers.target" ];
    timerConfig = { OnCalendar = "daily"; RandomizedDelaySec = "1h"; Persistent = true; };
  };
}
