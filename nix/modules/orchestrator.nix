# clf-orchestrator: a socket for the bots, a service that holds the queue. systemd makes the socket and its folder, so that the
# service needs no right to; its configuration holds no secret.
{ config, lib, pkgs, ... }:
let
  c = config.clawdlets;
  o = c.orchestrator;
  hostfiles = import ../hostfiles.nix;
  inherit (hostfiles) etc paths;
  state = paths.orchestratorStateDir;
  socket = paths.orchestratorSocket;
  package = (import ../packages { inherit pkgs; }).clf-orchestrator;
in
lib.mkIf o.enable {
  users.groups = { ${socket.group} = { }; ${state.group} = { }; ${o.operatorsGroup} = { }; };
  users.users = {
    ${state.owner} = { isSystemUser = true; inherit (state) group; };
    admin.extraGroups = [ o.operatorsGroup socket.group ]; # the socket is the group's; who is an operator is the other's word
  } // lib.mapAttrs' (name: _: lib.nameValuePair "bot-${name}" { extraGroups = [ socket.group ]; }) c.bots;
  environment.systemPackages = [ package ]; # clf, for bots and operators
  environment.etc.${etc paths.orchestratorConfig} = {
    inherit (paths.orchestratorConfig) mode;
    text = builtins.toJSON { inherit (o) store workers keepDays operatorsGroup; bootstrap.port = o.bootstrapPort; authorizedKeys = config.users.users.admin.openssh.authorizedKeys.keys; };
  };
  systemd.tmpfiles.rules = [ "d ${paths.clfRunDir.path} ${paths.clfRunDir.mode} root ${paths.clfRunDir.group} -" ];
  systemd.sockets.clf-orchestrator = {
    wantedBy = [ "sockets.target" ];
    socketConfig = { ListenStream = socket.path; SocketUser = "root"; SocketGroup = socket.group; SocketMode = socket.mode; };
  };
  systemd.services.clf-orchestrator = {
    description = "Job queue of the bots, and cattle";
    wantedBy = [ "multi-user.target" ]; # machines ask it too, on the tailnet
    requires = [ "clf-orchestrator.socket" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" "sops-install-secrets.service" "tailscaled-autoconnect.service" ];
    restartTriggers = [ config.environment.etc.${etc paths.orchestratorConfig}.text ];
    serviceConfig = hostfiles.data "hardening.json" // {
      Type = "notify";
      ExecStart = "${package}/bin/clf-orchestrator";
      User = state.owner;
      StateDirectory = lib.removePrefix "/var/lib/" state.path;
      StateDirectoryMode = state.mode;
      Restart = "on-failure";
      RestartSec = 2;
    };
  };
}
