package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"syscall"
	"testing"

	"github.com/spf13/cobra"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/daemon"
	"github.com/thaw-project/thaw/kind"
)

// verbs calls f for every command that does something.
func verbs(cmd *cobra.Command, f func(*cobra.Command)) {
	if len(cmd.Commands()) == 0 {
		f(cmd)
	}
	for _, c := range cmd.Commands() {
		if c.Name() != "completion" && c.Name() != "help" {
			verbs(c, f)
		}
	}
}

func TestEveryVerbHasAnExampleThatParses(t *testing.T) {
	seen := 0
	verbs(newRoot(), func(cmd *cobra.Command) {
		if cmd.Hidden {
			return
		}
		seen++
		if cmd.Example == "" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		for line := range strings.Lines(cmd.Example) {
			line, _, _ = strings.Cut(strings.TrimSpace(line), " > ")
			words := strings.Fields(line)
			if len(words) == 0 || words[0] != "thaw" {
				t.Errorf("%s: example %q is no thaw command", cmd.CommandPath(), line)
				continue
			}
			found, args, err := newRoot().Find(words[1:])
			if err == nil {
				err = found.ParseFlags(args)
			}
			if err == nil {
				err = found.ValidateArgs(found.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: example %q: %v", cmd.CommandPath(), line, err)
			}
		}
	})
	if seen < 20 {
		t.Errorf("only %d verbs", seen)
	}
}

func TestExitCodesAreThoseOfTheHelp(t *testing.T) {
	for want, errs := range map[int][]error{
		0:   {nil},
		1:   {errors.New("x"), syscall.EIO},
		2:   {usage{errors.New("x")}, kind.Wrap(kind.Invalid, errors.New("x"))},
		3:   {kind.Wrap(kind.NotFound, errors.New("x")), syscall.ENOENT},
		4:   {kind.Wrap(kind.InUse, errors.New("x")), kind.Wrap(kind.Exists, errors.New("x"))},
		5:   {kind.Wrap(kind.Unavailable, errors.New("x"))},
		6:   {fmt.Errorf("x: %w", syscall.ENOSPC)},
		7:   {kind.Wrap(kind.Corrupt, errors.New("x"))},
		8:   {syscall.EACCES, fmt.Errorf("x: %w", syscall.EROFS)},
		9:   {kind.Wrap(kind.Unsupported, errors.New("x"))},
		130: {context.Canceled, interrupted{kind.Wrap(kind.Canceled, errors.New("x")), "y"}},
	} {
		for _, err := range errs {
			if got := exitCode(err); got != want {
				t.Errorf("%v (%T): %d, want %d", err, err, got, want)
			}
		}
		if !strings.Contains(rootHelp, fmt.Sprintf("  %d  ", want)) {
			t.Errorf("the help does not list %d", want)
		}
	}
}

func TestMessagesAreOneLine(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx  context.Context
		err  error
		want string
	}{
		{t.Context(), errors.Join(errors.New("a"), errors.New("b")), "a; b"},
		{t.Context(), errors.New("a\r\nb\n"), "a; b"},
		{t.Context(), errors.New("no file \x1b[31mx\x00"), "no file \ufffd[31mx\ufffd"},
		{canceled, kind.Wrap(kind.Canceled, errors.New("deep within")), "interrupted"},
		{canceled, interrupted{context.Canceled, "nothing is left"}, "interrupted: nothing is left"},
		{canceled, errors.New("a disk failed"), "a disk failed"},
		{t.Context(), interrupted{errors.New("a disk failed"), "nothing is left"}, "a disk failed"},
	} {
		if got := message(c.ctx, c.err); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}

func TestUsageErrorsNameTheCommand(t *testing.T) {
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"imgae"}, []string{"imgae", "did you mean image"}},
		{[]string{"image", "rm"}, []string{"thaw image", "rm", "thaw image --help"}},
		{[]string{"lvol", "create", "x"}, []string{"thaw lvol create", "2 argument", "NAME SIZE"}},
		{[]string{"image", "prune", "--older-than", "soon"}, []string{"thaw image prune", "soon"}},
		{[]string{"image", "prune", "--older-than", "-1h"}, []string{"negative"}},
		{[]string{"completion", "tcsh"}, []string{"tcsh", "thaw completion --help"}},
		{[]string{"help", "imgae"}, []string{"imgae", "did you mean image"}},
		{[]string{"help", "card", "disks"}, []string{"thaw card", "disks", "did you mean disk"}},
		{[]string{"target", "--root", t.TempDir(), "--socket", t.TempDir() + "/s", "--metrics", "9600"}, []string{"--metrics", "9600", "with a port"}},
		{[]string{"containerd-config", "--containerd-version", "7"}, []string{"7", "1 or 2"}},
	} {
		root := newRoot()
		root.SetArgs(c.args)
		root.SetOut(io.Discard)
		root.SetErr(io.Discard)
		err := root.Execute()
		if exitCode(err) != 2 {
			t.Errorf("%v: %v", c.args, err)
			continue
		}
		for _, w := range c.says {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%v: %q does not say %q", c.args, err, w)
			}
		}
	}
}

func TestJSONHasAllFields(t *testing.T) {
	var b bytes.Buffer
	out := output{json: true}
	if err := out.print(&b, []*attacherv1.Lvol{{Name: `a"b`, SizeBytes: math.MaxInt64}}, nil); err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	decoder := json.NewDecoder(&b)
	decoder.UseNumber()
	if err := decoder.Decode(&got); err != nil {
		t.Fatal(err)
	}
	l := got[0]
	if l["name"] != `a"b` || l["size_bytes"] != json.Number("9223372036854775807") || l["allocated_clusters"] != json.Number("0") ||
		l["read_only"] != false || len(l["clones"].([]any)) != 0 {
		t.Errorf("%v", l)
	}
	for _, empty := range []any{[]*attacherv1.Image(nil), []snapshotInfo{}} {
		b.Reset()
		if err := out.print(&b, empty, nil); err != nil || b.String() != "[]\n" {
			t.Errorf("%T: %q, %v", empty, b.String(), err)
		}
	}
	b.Reset()
	report := &attacherv1.CheckStoreResponse{Problems: []*attacherv1.Problem{{Type: "leak"}}}
	if err := out.print(&b, report, nil); err != nil || !strings.Contains(b.String(), `"type": "leak"`) || !strings.Contains(b.String(), `"repaired": false`) {
		t.Errorf("%s, %v", b.String(), err)
	}
}

// FuzzSize: a size that is accepted is a number of bytes that can be had.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"20GiB", "512MiB", "1", "10 potatoes", "-5", "1e9", "0x10", "999999999999TiB", "1.5G", "9223372036854775807", "9223372036854775808", " 1 GiB ", "NaN", "Inf", "1_000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := daemon.ParseSize(s)
		if err != nil {
			if kind.Of(err) != kind.Invalid || strings.ContainsAny(err.Error(), "\n\r\x1b") || len(err.Error()) > 400 {
				t.Errorf("%q: %v of kind %q", s, err, kind.Of(err))
			}
			return
		}
		if n <= 0 {
			t.Errorf("%q is %d bytes", s, n)
		}
		// What is written reads back as nearly the same (four digits).
		text, err := daemon.Size(n).MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		again, err := daemon.ParseSize(string(text))
		if err != nil || math.Abs(float64(again)/float64(n)-1) > 1e-3 {
			t.Errorf("%q is %d, written %s, which is %d (%v)", s, n, text, again, err)
		}
	})
}
