package nvmf

import "github.com/thaw-project/thaw/nvme"

// Discovery is reachable at every address at which something listens. It may have
// addresses of its own beside, for hosts that know only those.

// reachable is subsystem, with discovery.
func (t *Target) reachable(nqn string) (*subsystem, error) {
	if nqn == nvme.DiscoveryNQN {
		return t.discovery, nil
	}
	return t.subsystem(nqn)
}

// DiscoveryListeners are the addresses that were added for discovery, sorted.
func (t *Target) DiscoveryListeners() []string { return t.discovery.addresses() }

// Subsystem is the present state of one subsystem; the error is kind.NotFound, for
// discovery too.
func (t *Target) Subsystem(nqn string) (SubsystemInfo, error) {
	s, err := t.subsystem(nqn)
	if err != nil {
		return SubsystemInfo{}, err
	}
	return s.info(), nil
}
