package nvmf

// Using counts the commands that use the device of an nvmeNamespace now.
func Using(t *Target, nqn string, nsid uint32) (n int32) {
	s, err := t.subsystem(nqn)
	if err != nil {
		return 0
	}
	ns := s.lookup(nsid)
	if ns == nil {
		return 0
	}
	ns.mu.Lock()
	defer ns.mu.Unlock()
	for u := range ns.users {
		n += u.inflight.Load()
	}
	return n
}
