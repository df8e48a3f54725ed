# The image of a throw-away server: cloud-init writes files, all of them to memory, and starts one unit. Nothing else of it runs.
{ lib, pkgs, modulesPath, ... }:
let
  hostfiles = import ../hostfiles.nix;
  inherit (hostfiles) paths;
  sshd = hostfiles.data "sshd.json";
  tools = import ../packages/host-tools.nix { inherit pkgs; };
in
{
  imports = [ (modulesPath + "/profiles/qemu-guest.nix") ];
  boot.loader.grub = { enable = true; efiSupport = true; efiInstallAsRemovable = true; };
  boot.growPartition = true;
  disko.devices.disk.main = {
    type = "disk";
    device = (import ../fleet.nix).hostDefaults.diskDevice;
    imageSize = "4G";
    content = {
      type = "gpt";
      partitions = {
        bios = { size = "1M"; type = "EF02"; };
        esp = { size = "256M"; type = "EF00"; content = { type = "filesystem"; format = "vfat"; mountpoint = "/boot"; }; };
        root = { size = "100%"; content = { type = "filesystem"; format = "ext4"; mountpoint = "/"; }; };
      };
    };
  };
  fileSystems."/".autoResize = true;
  # cloud-init keeps the user data there, and with it the key to the tailnet.
  fileSystems."/var/lib/cloud" = { fsType = "tmpfs"; options = [ "mode=${paths.cattleRunDir.mode}" "size=16M" ]; };

  networking = { useDHCP = false; useNetworkd = true; hostName = ""; firewall.enable = false; };
  systemd.network.networks."10-uplink" = {
    matchConfig.Name = "en* eth*";
    networkConfig = { DHCP = "ipv4"; IPv6AcceptRA = false; };
  };
  services.cloud-init = {
    enable = true;
    network.enable = false; # its network files would stand before ours
    settings = {
      datasource_list = [ "Hetzner" "None" ];
      users = [ ];
      disable_root = true; # the project's keys are not for root here
      ssh_deletekeys = false;
      manage_resolv_conf = false;
      cloud_init_modules = [ "seed_random" "write-files" "update_hostname" ];
      cloud_config_modules = [ "runcmd" ];
      cloud_final_modules = [ "scripts_user" ];
    };
  };

  # Nothing comes in but by the tailnet. What a task must not reach is closed by clawdlets-cattle, before there is a task.
  environment.etc = {
    "clawdlets/exposure-at-install".text = "tailnet\n";
    "clawdlets/tailscale".text = "";
    "clawdlets/cattle/egress.nft".text = hostfiles.text "cattle/egress.nft";
  };
  systemd.units = lib.genAttrs [ "clawdlets-cattle.service" "clawdlets-task.service" ]
    (unit: { text = hostfiles.filled { BIN = "${tools}/bin"; } (hostfiles.text "cattle/${unit}"); });
  users.groups.clawdlets-task = { };
  users.users.clawdlets-task = { isSystemUser = true; group = "clawdlets-task"; };
  systemd.services.clawdlets-firewall = {
    description = "Host firewall";
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-pre.target" ];
    before = [ "network-pre.target" "sshd.service" "cloud-init.service" ];
    after = [ "local-fs.target" ];
    unitConfig.DefaultDependencies = false;
    serviceConfig = { Type = "oneshot"; RemainAfterExit = true; ExecStart = "${tools}/bin/clawdlets-exposure restore"; };
  };

  services.tailscale = { enable = true; openFirewall = false; interfaceName = hostfiles.tailnet.interface; };
  systemd.tmpfiles.rules = [
    "d ${paths.cattleRunDir.path} ${paths.cattleRunDir.mode} root root -"
    "d ${paths.cattleDir.path} ${paths.cattleDir.mode} root root -"
  ];
  services.openssh = {
    enable = true;
    openFirewall = false;
    authorizedKeysInHomedir = false;
    hostKeys = [ { type = "ed25519"; path = sshd.hostKey; } ];
    sftpServerExecutable = sshd.sftp;
    authorizedKeysFiles = lib.mkForce [ paths.cattleAuthorizedKeys.path ];
    inherit (sshd) settings;
  };
  users.mutableUsers = false;
  users.users.admin = { isNormalUser = true; extraGroups = [ "systemd-journal" ]; }; # for clawdlets cattle logs
  users.allowNoPasswordLogin = true; # its keys come with the user data, and it is thrown away
  environment.systemPackages = [ tools ] ++ (with pkgs; [ curl gawk iproute2 nftables ]);
  time.timeZone = "UTC";
  system.stateVersion = "25.11";
}
