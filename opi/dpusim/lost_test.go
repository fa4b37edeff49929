package dpusim

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// cutAt serves QEMU's monitor at another socket and drops the first connection over which
// a command comes, before QEMU hears of it.
func cutAt(t *testing.T, qmp, path, command string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var owned sync.WaitGroup
	t.Cleanup(func() { l.Close(); owned.Wait() })
	owned.Go(func() {
		for cut := false; ; {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("unix", qmp)
			if err != nil {
				client.Close()
				continue
			}
			back := make(chan struct{})
			owned.Go(func() { defer close(back); _, _ = io.Copy(client, server) }) // ends with the connections
			for lines := bufio.NewReader(client); ; {
				line, err := lines.ReadBytes('\n')
				if err == nil && !cut && bytes.Contains(line, []byte(`"execute":"`+command+`"`)) {
					cut, err = true, net.ErrClosed
				}
				if err == nil {
					_, err = server.Write(line)
				}
				if err != nil {
					break
				}
			}
			client.Close()
			server.Close()
			<-back
		}
	})
}

// TestMonitorLost loses QEMU's monitor in the middle of a plug: nothing is said of the
// function then, and to plug it again completes it.
func TestMonitorLost(t *testing.T) {
	l := start(t, true)
	nqn := l.subsystem("one", 7)
	for i, command := range []string{"blockdev-add", "device_add"} {
		path := filepath.Join(l.dir, command)
		cutAt(t, filepath.Join(l.dir, "qmp"), path, command)
		s, err := New(Options{QMP: path, Target: l.client, Functions: 4, Dir: filepath.Join(l.dir, "s")})
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Plug(t.Context(), nqn, fn(i)); !errors.Is(err, kind.Unavailable) || errors.Is(err, kind.InUse) {
			t.Errorf("%s: %v, want kind %s only", command, err, kind.Unavailable)
		}
		if err := s.Plug(t.Context(), nqn, fn(i)); err != nil {
			t.Errorf("%s, again: %v", command, err)
		}
		l.wantShown(i, nqn, "SN-one", 7)
		if err := l.Unplug(t.Context(), nqn, fn(i)); err != nil {
			t.Error(err)
		}
	}
}
