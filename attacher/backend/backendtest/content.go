package backendtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/thaw-project/thaw/target/bdev"
)

// content is what a device should hold.
type content []byte

func newContent(size int64) content { return make(content, size) }

func (c content) clone() content { return bytes.Clone(c) }

// write writes to the device and notes it.
func (c content) write(t testing.TB, d bdev.Device, p []byte, off int64) {
	t.Helper()
	if n, err := d.WriteAt(p, off); n != len(p) || err != nil {
		t.Fatalf("write %d bytes at %d: %d, %v", len(p), off, n, err)
	}
	copy(c[off:], p)
}

// check reads all of the device, and past its end.
func (c content) check(t testing.TB, what string, d bdev.Device) {
	t.Helper()
	if d.SizeBytes() != int64(len(c)) {
		t.Fatalf("%s has %d bytes, want %d", what, d.SizeBytes(), len(c))
	}
	const step = 1<<20 - 512
	p := make([]byte, step)
	for off := int64(0); off < int64(len(c)); off += step {
		want := c[off:min(off+step, int64(len(c)))]
		n, err := d.ReadAt(p[:len(want)], off)
		if n != len(want) || err != nil && !(errors.Is(err, io.EOF) && off+int64(n) == int64(len(c))) {
			t.Fatalf("%s: read %d bytes at %d: %d, %v", what, len(want), off, n, err)
		}
		if at := mismatch(p[:n], want); at >= 0 {
			t.Fatalf("%s differs at %d: %x, want %x", what, off+int64(at), p[at:min(at+16, n)], want[at:min(at+16, len(want))])
		}
	}
}

func mismatch(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

func randomBytes(seed uint64, n int64) []byte {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	p := make([]byte, n)
	r := rand.NewChaCha8(key)
	_, _ = r.Read(p) // never fails
	return p
}
