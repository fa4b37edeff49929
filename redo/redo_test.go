package redo

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

const boot1 = "11111111-1111-1111-1111-111111111111"
const boot2 = "22222222-2222-2222-2222-222222222222"

func open(t *testing.T, prefix, boot string) (*Log, []string) {
	t.Helper()
	var got []string
	l, err := openBoot(prefix, boot, func(r []byte) error { got = append(got, string(r)); return nil })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, got
}

func appendAll(t *testing.T, l *Log, records ...string) {
	t.Helper()
	for _, r := range records {
		if err := l.Append([]byte(r)); err != nil {
			t.Fatal(err)
		}
	}
}

func equal(t *testing.T, got []string, want ...string) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Fatalf("replayed %q, want %q", got, want)
	}
}

func TestReplayAfterDeathInOrder(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "redo")
	l, got := open(t, prefix, boot1)
	equal(t, got)
	appendAll(t, l, "a", "b")
	if _, err := l.Rotate(); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, "c")
	_, got = open(t, prefix, boot1) // the first is not closed: it "died"
	equal(t, got, "a", "b", "c")
	_, got = open(t, prefix, boot1) // died again before a checkpoint
	equal(t, got, "a", "b", "c")
}

func TestReleaseDropsOnlyTheCheckpointed(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "redo")
	l, _ := open(t, prefix, boot1)
	appendAll(t, l, "a")
	s, err := l.Rotate()
	if err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, "b")
	if err := l.Release(s); err != nil {
		t.Fatal(err)
	}
	_, got := open(t, prefix, boot1)
	equal(t, got, "b")
}

func TestAnotherBootDiscards(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "redo")
	l, _ := open(t, prefix, boot1)
	appendAll(t, l, "a")
	_, got := open(t, prefix, boot2)
	equal(t, got)
}

func TestTornTailAtEveryLength(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "redo")
	l, _ := open(t, prefix, boot1)
	appendAll(t, l, "first", "second")
	raw, err := os.ReadFile(prefix + ".1")
	if err != nil {
		t.Fatal(err)
	}
	one := headerBytes + frameBytes + len("first")
	for n := range raw {
		dir := t.TempDir()
		p := filepath.Join(dir, "redo")
		if err := os.WriteFile(p+".1", raw[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		_, got := open(t, p, boot1)
		if n < one {
			equal(t, got)
		} else {
			equal(t, got, "first")
		}
	}
}

func TestNewerVersionRefused(t *testing.T) {
	prefix := filepath.Join(t.TempDir(), "redo")
	open(t, prefix, boot1)
	raw, _ := os.ReadFile(prefix + ".1")
	raw[len(magic)] = 9
	os.WriteFile(prefix+".1", raw, 0o600)
	_, err := openBoot(prefix, boot1, func([]byte) error { return nil })
	if !errors.Is(err, kind.Unsupported) || !strings.Contains(err.Error(), "version 9") {
		t.Fatalf("got %v", err)
	}
}

func TestRemoveLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	l, _ := open(t, filepath.Join(dir, "redo"), boot1)
	appendAll(t, l, "a")
	l.Rotate()
	if err := l.Remove(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Fatalf("left %v", left)
	}
}

func FuzzDecode(f *testing.F) {
	header := append([]byte(magic), 1, 0, 0, 0)
	header = append(header, boot1...)
	f.Add(header)
	f.Add(append(header, 1, 0, 0, 0, 0, 0, 0, 0, 'x'))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var n int
		decode(bytes.Clone(raw), boot1, func(r []byte) error { n += len(r); return nil })
		if n > len(raw) {
			t.Fatalf("replayed %d bytes out of %d", n, len(raw))
		}
	})
}
