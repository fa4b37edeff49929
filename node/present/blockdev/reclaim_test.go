package blockdev

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/thaw-project/thaw/kind"
)

func TestServeThroughReclaim(t *testing.T) {
	if err := ServeThroughReclaim(); err != nil {
		if k := kind.Of(err); k != kind.Denied && k != kind.Unsupported {
			t.Fatal(err)
		}
		t.Skipf("%v: run with CAP_SYS_RESOURCE, without cgo, on Linux 5.6 or later", err)
	}
	done := make(chan int)
	for range 8 { // on threads old and new
		go func() {
			runtime.LockOSThread()
			n, err := unix.PrctlRetInt(unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0)
			if err != nil {
				n = -1
			}
			done <- n
		}()
	}
	for range 8 {
		if n := <-done; n != 1 {
			t.Errorf("PR_GET_IO_FLUSHER on a thread: %d", n)
		}
	}
}
