package ublk

import (
	"os"
	"testing"
	"time"

	"github.com/thaw-project/thaw/e2e/guest"
)

// TestGuest runs the tests that need ublk, in a guest whose kernel has it.
func TestGuest(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	g := guest.New(t, guest.Options{Modules: []string{"ublk_drv"}, CPUs: 2, Files: map[string]string{"test": exe}})
	match := "^TestKernel"
	if m := os.Getenv("THAW_VM_RUN"); m != "" {
		match = m
	}
	// A test that hangs may have made its process unkillable: what waits in the kernel is shown.
	p, err := g.Start(t.Context(), `cd /tmp
		{ /host/test -test.v -test.timeout=8m -test.run '`+match+`' 2>&1; echo $? > code; } &
		for i in $(seq 520); do [ ! -e code ] || break; sleep 1; done
		if [ -e code ]; then code=$(cat code); else
			code=124
			mount -t debugfs none /sys/kernel/debug
			for f in /sys/kernel/debug/block/ublkb*/{state,requeue_list,hctx*/{state,busy,flags,dispatch}}; do echo "== $f"; cat $f; done
			for t in /proc/[0-9]*/task/*; do
				grep -Eq '^State:.[DR]|^Name:.*(kworker|iou)' $t/status && ! grep -q worker_thread+ $t/stack && { echo "== $t $(cat $t/comm)"; cat $t/stack; }
			done
		fi
		dmesg | grep -vi systemd | tail -n 40
		! dmesg | grep -E 'WARNING|BUG:|Oops' || code=1
		exit $code`, nil)
	if err != nil {
		t.Fatal(err)
	}
	for shown, ended := 0, false; !ended; {
		select {
		case <-p.Done():
			ended = true
		case <-time.After(time.Second):
		}
		out := p.Output()
		if testing.Verbose() {
			os.Stderr.WriteString(out[shown:])
		}
		shown = len(out)
	}
	if code, err := p.Wait(t.Context()); code != 0 || err != nil {
		t.Errorf("status %d, %v\n%s", code, err, p.Output())
	}
}
