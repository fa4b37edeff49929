package opi

import (
	"strings"
	"testing"
)

func TestNames(t *testing.T) {
	for _, bad := range []string{"", "nvmeSubsystems", "nvmeSubsystems/", "nvmeSubsystems//", "nvmeSubsystems/a/b", "nvmesubsystems/a", "x/nvmeSubsystems/a",
		"nvmeSubsystems/a b", "nvmeSubsystems/%", "nvmeSubsystems/%4", "nvmeSubsystems/%41", "nvmeSubsystems/%2f", "nvmeSubsystems/%+2", "nvmeSubsystems/%2F%", "nvmeSubsystems/ä",
		"nvmeSubsystems/" + strings.Repeat("a", maxIDBytes+1)} {
		if id, err := parse1(bad, subsystems); err == nil {
			t.Errorf("%q is %q", bad, id)
		}
	}
	for text, id := range map[string]string{"nqn.2014-08.org.example:a": "nqn.2014-08.org.example:a", "a/b%c": "a%2Fb%25c", "ä": "%C3%A4", "\x00": "%00"} {
		if got := escape(text); got != id {
			t.Errorf("escape(%q) is %q", text, got)
		}
	}
}

func FuzzNames(f *testing.F) {
	f.Add("a/b%2F")
	f.Add("nvmeSubsystems/a/nvmeNamespaces/b")
	f.Fuzz(func(t *testing.T, s string) {
		if s != "" && len(s) <= 223 {
			if got, err := unescape(escape(s)); err != nil || got != s {
				t.Fatalf("%q comes back as %q %v", s, got, err)
			}
			if texts, err := parse(join(subsystems, s, controllers, s), subsystems, controllers); err != nil || texts[0] != s || texts[1] != s {
				t.Fatalf("%q: %q %v", s, texts, err)
			}
		}
		if texts, err := parse(s, subsystems, nvmeNamespaces); err == nil && join(subsystems, texts[0], nvmeNamespaces, texts[1]) != s {
			t.Fatalf("%q has another name", s)
		}
		if _, err := bdevName(s); err == nil && len(s) > 4*maxIDBytes {
			t.Fatalf("a name of %d bytes is accepted", len(s))
		}
		if _, _, err := page([]string{"a", "b"}, func(s string) string { return s }, 1, s); err != nil && s == "" {
			t.Fatal(err)
		}
	})
}
