package runstate

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

type example struct{ Disks []string }

func TestSaveLoad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	var got example
	if found, err := Load(path, 1, &got); found || err != nil {
		t.Fatalf("no file: %t, %v", found, err)
	}
	if err := Save(path, 1, example{[]string{"a", "b"}}); err != nil {
		t.Fatal(err)
	}
	if found, err := Load(path, 1, &got); !found || err != nil || len(got.Disks) != 2 {
		t.Fatalf("%t, %v, %+v", found, err, got)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if _, err := Load(path, 0, &got); !errors.Is(err, kind.Unsupported) {
		t.Errorf("newer: %v", err)
	}
	raw, _ := os.ReadFile(path)
	boot, _ := BootID()
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(strings.Replace(string(raw), boot, "another", 1))
	if found, err := Load(path, 1, &got); found || err != nil {
		t.Errorf("of another boot: %t, %v", found, err)
	}
	for _, bad := range []string{"", "{", strings.Replace(string(raw), `["a","b"]`, "7", 1)} {
		write(bad)
		if _, err := Load(path, 1, &got); !errors.Is(err, kind.Corrupt) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "state.json")
	f, err := Lock(path, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(path, 0); !errors.Is(err, kind.InUse) {
		t.Errorf("a second lock: %v", err)
	}
	f.Close()
	if f, err = Lock(path, 0); err != nil {
		t.Fatal(err)
	}
	f.Close()
}

func TestCheckID(t *testing.T) {
	for _, good := range []string{"a", "global-1.2_x", strings.Repeat("x", 128), "..."} {
		if err := CheckID(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", ".", "..", "a/b", "a b", "ä", "a\n", strings.Repeat("x", 129)} {
		if err := CheckID(bad); !errors.Is(err, kind.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
