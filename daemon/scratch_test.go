package daemon

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// TestScratchOfMany: who asks for one volume at the same time gets the same, whole.
func TestScratchOfMany(t *testing.T) {
	s := scratchFiles{dir: filepath.Join(t.TempDir(), "scratch")}
	const size = 64 << 20
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			name, err := s.ensure(t.Context(), size)
			if err != nil {
				t.Error(err)
				return
			}
			d, err := openScratchFile(s.dir, name)
			if err != nil {
				t.Error(err)
				return
			}
			defer d.Close()
			magic := make([]byte, 2)
			if _, err := d.ReadAt(magic, 1024+56); err != nil || magic[0] != 0x53 || magic[1] != 0xef || d.SizeBytes() != size {
				t.Errorf("%d bytes, magic number %x of ext4: %v", d.SizeBytes(), magic, err)
			}
		})
	}
	wg.Wait()
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v %v", left, err)
	}
	for _, size := range []int64{0, 1 << 20, size + 512, 32 << 40} {
		if _, err := s.ensure(t.Context(), size); kind.Of(err) != kind.Invalid {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
}
