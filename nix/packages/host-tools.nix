# The programs that the Python side calls on a host, at /run/current-system/sw/bin: shared with the lab, and NixOS' own.
{ pkgs }:
let
  shared = map (name: ../../clawdlets_ops/lab/profile + "/${name}") [ "clawdlets-exposure" "clawdlets-facts" "clawdlets-sync" ];
  own = map (name: ../../clawdlets_ops/hostfiles + "/${name}") [ "clawdlets-activate" "clawdlets-egress" "clawdlets-ipv6" "clawdlets-join" "clawdlets-key-expiry" ];
  cattle = map (name: ../../clawdlets_ops/hostfiles/cattle + "/${name}") [ "clawdlets-cattle" "clawdlets-task" ];
in
pkgs.runCommand "clawdlets-host-tools" { buildInputs = [ pkgs.python3 pkgs.bash ]; } ''
  mkdir -p $out/bin
  ${builtins.concatStringsSep "\n" (map (file: "install -m 0555 ${file} $out/bin/${baseNameOf (toString file)}") (shared ++ own ++ cattle))}
  patchShebangs $out/bin
''
