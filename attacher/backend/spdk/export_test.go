package spdk

// Kill ends a Backend as the death of its process does: what it told the target stays.
func (b *Backend) Kill() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.end()
	b.wg.Wait()
	b.access.close()
}
