# hosts.<name> of fleet/clawdlets.json IS the value of `clawdlets`: an unknown key, a wrong value and a rule between values that
# is broken fail the evaluation, as they fail in Python. See docs/reference/options.md.
{ config, lib, ... }:
let fleet = import ../fleet.nix; in
{
  options.clawdlets = fleet.hostOptions lib;
  config.assertions = map (fault: { assertion = false; message = "${fault.path}: ${fault.what}"; })
    (fleet.hostFaults "clawdlets" config.clawdlets);
}
