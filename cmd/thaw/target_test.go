package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thaw-project/thaw/spdk"
)

// run executes a command line and returns what it printed and its exit status.
func run(ctx context.Context, args ...string) (out string, code int, err error) {
	root := newRoot()
	var b bytes.Buffer
	root.SetOut(&b)
	root.SetErr(&b)
	root.SetArgs(args)
	err = root.ExecuteContext(ctx)
	return b.String(), exitCode(err), err
}

// TestTarget runs a target and its client by their command lines.
func TestTarget(t *testing.T) {
	dir, err := os.MkdirTemp("", "cmd-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "run", "sock")
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, _, err := run(ctx, "target", "--root", dir, "--socket", socket, "--persist", "--log-level", "error")
		ended <- err
	}()
	call := func(args ...string) (string, int, error) {
		return run(t.Context(), append([]string{"target", "call", "--socket", socket}, args...)...)
	}
	client, err := spdk.New(spdk.Options{Socket: socket})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if err := client.FrameworkWaitInit(t.Context()); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v %v", st.Mode(), err)
	}
	for _, c := range []struct {
		args []string
		out  string
		code int
		err  string
	}{
		{[]string{"bdev_malloc_create", "--params", `{"name":"m","num_blocks":8,"block_size":512}`}, "m\n", 0, ""},
		{[]string{"bdev_malloc_create", "--params", `{"name":"m","num_blocks":8,"block_size":512}`}, "", 4, "bdev_malloc_create: File exists (-17): the target's log says why"},
		{[]string{"bdev_malloc_delete", "--params", `{"name":"n"}`}, "", 3, "No such device (-19)"},
		{[]string{"nosuch"}, "", 2, "Method not found (-32601): see 'thaw target call rpc_get_methods'"},
		{[]string{"bdev_malloc_delete", "--params", `[]`}, "", 2, "--params must be a JSON object"},
		{[]string{"nbd_get_disks"}, "[]\n", 0, ""},
		{[]string{"bdev_wait_for_examine"}, "true\n", 0, ""},
		{[]string{"bdev_malloc_create", "--json", "--params", `{"name":"j","num_blocks":8,"block_size":512}`}, "\"j\"\n", 0, ""},
		{[]string{}, "", 2, "takes 1 argument"},
	} {
		out, code, err := call(c.args...)
		if out != c.out || code != c.code || (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: %q %d %v, want %q %d %s", c.args, out, code, err, c.out, c.code, c.err)
		}
	}
	out, _, err := call("bdev_get_bdevs")
	if err != nil || !json.Valid([]byte(out)) || !strings.Contains(out, "\n    \"name\": \"m\"") {
		t.Errorf("%s %v", out, err)
	}
	for _, c := range []struct {
		args []string
		code int
		err  string
	}{
		{[]string{"--root", dir, "--socket", socket + "2"}, 4, "another thaw target"},
		{[]string{"--root", dir + "/other", "--socket", socket}, 4, "another process does already"},
		{[]string{"--root", dir + "/other", "--socket", socket + "2", "--engine", "steam"}, 2, "it is shared-nothing or thread-pool"},
		{[]string{"--root", dir + "/other", "--socket", socket + "2", "--log-level", "loud"}, 2, "must be debug, info, warn or error"},
		{[]string{"--root", dir + "/other", "--socket", socket + "2", "--metrics", "nowhere"}, 2, "with a port"},
	} {
		_, code, err := run(t.Context(), append([]string{"target"}, c.args...)...)
		if code != c.code || err == nil || !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: %d %v, want %d %s", c.args, code, err, c.code, c.err)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("stopped: %v", err)
	}
	if _, code, err := call("nbd_get_disks"); code != 5 || !strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("after it stopped: %d %v", code, err)
	}
}
