package ublk

import (
	"testing"

	"github.com/thaw-project/thaw/node/present/presenttest"
)

// BenchmarkPresented is the same for each presentation: see presenttest.
func BenchmarkPresented(b *testing.B) {
	if err := Probe(); err != nil {
		b.Skipf("runs in a guest: %v", err)
	}
	presenttest.Benchmark(b, subject)
}
