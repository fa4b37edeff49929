package main

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// TestNobodyListens: who finds nobody is told where it looked and what to start.
func TestNobodyListens(t *testing.T) {
	run := t.TempDir()
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"lvol", "list"}, []string{"attacher.sock", "thaw.sock", "'thaw server' or 'thaw attacher'"}},
		{[]string{"attachment", "list"}, []string{"attacher.sock", "thaw.sock", "'thaw attacher'"}},
		{[]string{"card", "disk", "list"}, []string{"attacher.sock", "--role card", "on the card"}},
		{[]string{"card", "function", "list"}, []string{"--role card"}},
		{[]string{"block", "list"}, []string{"image-mgmt.sock", "thaw.sock", "'thaw image-mgmt'"}},
		{[]string{"snapshot", "list"}, []string{"snapshotter.sock", "'thaw snapshotter'"}},
	} {
		root := newRoot()
		root.SetArgs(append(c.args, "--run", run))
		err := root.ExecuteContext(t.Context())
		if exitCode(err) != 5 {
			t.Errorf("%v: %v", c.args, err)
			continue
		}
		for _, w := range append(c.says, run, "--run") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v: %q does not say %q", c.args, err, w)
			}
		}
	}
}

// TestPeerCannotBeUsed: what a conversion opened is closed again, whatever fails after it.
func TestPeerCannotBeUsed(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		args []string
		code int
		says string
	}{
		{"no files", []string{"--attacher", "127.0.0.1:1", "--certificate", dir + "/c", "--key", dir + "/k", "--ca", dir + "/ca", "--card", dir + "/card.sock"}, 5, "card.sock"},
		{"no socket", []string{"--attacher", dir + "/attacher.sock", "--card", dir + "/card.sock"}, 5, "card.sock"},
	} {
		root := newRoot()
		root.SetArgs(append([]string{"image", "convert", "oci:" + dir, "oci:" + dir + ":x", "--root", dir, "--run", dir}, c.args...))
		if err := root.ExecuteContext(t.Context()); exitCode(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestAddressInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	dir := t.TempDir()
	root := newRoot()
	root.SetArgs([]string{"target", "--root", filepath.Join(dir, "r"), "--socket", filepath.Join(dir, "s"), "--metrics", l.Addr().String()})
	if err := root.ExecuteContext(t.Context()); exitCode(err) != 4 || !strings.Contains(err.Error(), l.Addr().String()) {
		t.Error(err)
	}
}
