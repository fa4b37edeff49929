package attacher

import "context"

// Sweep is the work of the background, once.
func (a *Attacher) Sweep(ctx context.Context) { a.sweep(ctx) }
