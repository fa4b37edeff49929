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
	match := "^TestKernel|^TestProbe"
	if m := os.Getenv("THAW_VM_RUN"); m != "" {
		match = m
	}
	p, err := g.Start(t.Context(), `cd /tmp
		/host/test -test.v -test.timeout=90s -test.run '`+match+`' 2>&1; code=$?
		if [ $code != 0 ]; then echo w > /proc/sysrq-trigger; fi
		dmesg | grep -vi systemd | tail -n 60
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
