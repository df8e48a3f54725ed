# The machine: boot (BIOS and UEFI), disk, Hetzner's network, users, sudo, our programs, Nix.
{ config, lib, pkgs, modulesPath, ... }:
let
  c = config.clawdlets;
  arm = c.system == "aarch64-linux";
  hostfiles = import ../hostfiles.nix;
  tools = import ../packages/host-tools.nix { inherit pkgs; };
in
{
  imports = [ (modulesPath + "/profiles/qemu-guest.nix") ];

  nixpkgs.hostPlatform = c.system;

  # x86 servers of Hetzner's start by BIOS or UEFI, by their type and age; arm ones by UEFI alone. One disk fits both.
  boot.loader.grub = {
    enable = true;
    efiSupport = true;
    efiInstallAsRemovable = true;
    devices = lib.mkIf arm [ "nodev" ]; # else disko names the disk, for the sake of the EF02 partition
  };
  disko.devices.disk.main = {
    type = "disk";
    device = c.diskDevice;
    content = {
      type = "gpt";
      partitions = lib.optionalAttrs (!arm) { bios = { size = "1M"; type = "EF02"; }; } // {
        esp = { size = "512M"; type = "EF00"; content = { type = "filesystem"; format = "vfat"; mountpoint = "/boot"; mountOptions = [ "umask=0077" ]; }; };
        root = { size = "100%"; content = { type = "filesystem"; format = "ext4"; mountpoint = "/"; }; };
      };
    };
  };

  networking = {
    useDHCP = false;
    useNetworkd = true;
    # The host's firewall is clawdlets-exposure's: it can be tried, kept and taken back while the host runs.
    firewall.enable = false;
  };
  systemd.network.networks."10-uplink" = {
    matchConfig.Name = "en* eth*";
    networkConfig = { DHCP = if c.hetzner.ipv4 then "ipv4" else "no"; IPv6AcceptRA = false; };
  };
  # Hetzner announces no IPv6: the address is static, and the metadata service knows it.
  systemd.services.clawdlets-ipv6 = lib.mkIf c.hetzner.ipv6 {
    description = "The static IPv6 address of this server";
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    serviceConfig = { Type = "oneshot"; RemainAfterExit = true; ExecStart = "${tools}/bin/clawdlets-ipv6 configure"; Restart = "on-failure"; RestartSec = 10; };
  };

  users.mutableUsers = false;
  # Users are made by a unit, after the unit that decrypts their password hashes.
  services.userborn.enable = true;
  users.users = {
    root.hashedPassword = "!";
    admin = {
      isNormalUser = true;
      extraGroups = [ "systemd-journal" ]; # no wheel: what it may do as root is in the sudoers file, word for word
      hashedPasswordFile = config.sops.secrets.admin_password_hash.path;
    };
    breakglass = {
      isNormalUser = true;
      extraGroups = [ "wheel" ];
      hashedPasswordFile = config.sops.secrets.breakglass_password_hash.path;
    };
  };
  # Not execWheelOnly: admin is not in wheel, and runs the programs below through sudo.
  security.sudo = { enable = true; execWheelOnly = false; wheelNeedsPassword = true; extraConfig = hostfiles.text "sudoers"; };

  environment.systemPackages = [ tools ] ++ (with pkgs; [ curl gawk iproute2 nftables sops util-linux ]);
  environment.etc = {
    "clawdlets/exposure-at-install".text = if c.sshExposure.mode == "public" then "public\n" else "bootstrap\n";
    "clawdlets/profile.json".text = builtins.toJSON { host = config.networking.hostName; };
  };
  systemd.services.clawdlets-firewall = {
    description = "Host firewall";
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-pre.target" ];
    before = [ "network-pre.target" "sshd.service" ];
    after = [ "local-fs.target" ];
    unitConfig.DefaultDependencies = false;
    serviceConfig = { Type = "oneshot"; RemainAfterExit = true; ExecStart = "${tools}/bin/clawdlets-exposure restore"; };
  };

  services.qemuGuest.enable = true;
  nix.settings = {
    experimental-features = [ "nix-command" "flakes" ];
    allowed-users = [ "root" "@wheel" ];
    trusted-users = [ "root" ]; # whoever is trusted here is root
  };
  time.timeZone = "UTC";
  system.stateVersion = "25.11";
}
