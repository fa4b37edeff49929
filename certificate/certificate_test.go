package certificate

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/thaw-project/thaw/kind"
)

func parse(t *testing.T, path string) *x509.Certificate {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(raw)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestIssue(t *testing.T) {
	dir := t.TempDir()
	ca := filepath.Join(dir, "ca")
	now := time.Now()
	authority, err := NewAuthority(ca, now)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	store, err := New(ca, out, Issue{Node: "store-1", Addresses: []string{"10.0.0.1", "store-1.example"}, Days: 30}, now)
	if err != nil {
		t.Fatal(err)
	}
	node, err := New(ca, out, Issue{Node: "node-1"}, now)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{authority.Key, store.Key, node.Key} {
		if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	pool := x509.NewCertPool()
	pool.AddCert(parse(t, node.CA))
	verify := func(path, host string, usage x509.ExtKeyUsage, at time.Time) error {
		_, err := parse(t, path).Verify(x509.VerifyOptions{Roots: pool, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}, CurrentTime: at})
		return err
	}
	for _, c := range []struct {
		path, host string
		usage      x509.ExtKeyUsage
		at         time.Time
		good       bool
	}{
		{store.Certificate, "10.0.0.1", x509.ExtKeyUsageServerAuth, now, true},
		{store.Certificate, "store-1.example", x509.ExtKeyUsageServerAuth, now.AddDate(0, 0, 29), true},
		{store.Certificate, "10.0.0.1", x509.ExtKeyUsageServerAuth, now.AddDate(0, 0, 31), false},
		{store.Certificate, "10.0.0.2", x509.ExtKeyUsageServerAuth, now, false},
		{node.Certificate, "", x509.ExtKeyUsageClientAuth, now, true},
		{node.Certificate, "", x509.ExtKeyUsageServerAuth, now, false}, // a node cannot pose as a store
	} {
		if err := verify(c.path, c.host, c.usage, c.at); (err == nil) != c.good {
			t.Errorf("%s for %q: %v, want good %t", c.path, c.host, err, c.good)
		}
	}
	if name := parse(t, node.Certificate).Subject.CommonName; name != "node-1" {
		t.Errorf("common name %q", name)
	}
	if _, err := tls.LoadX509KeyPair(node.Certificate, node.Key); err != nil {
		t.Error(err)
	}
}

func TestRefusals(t *testing.T) {
	dir := t.TempDir()
	ca, other := filepath.Join(dir, "ca"), filepath.Join(dir, "other")
	now := time.Now()
	for _, d := range []string{ca, other} {
		if _, err := NewAuthority(d, now); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := NewAuthority(ca, now); !errors.Is(err, kind.Exists) {
		t.Errorf("a second authority in one place: %v", err)
	}
	out := filepath.Join(dir, "out")
	if _, err := New(ca, out, Issue{Node: "node-1"}, now); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(filepath.Join(out, "node-1.key"))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		ca    string
		issue Issue
		kind  kind.Kind
	}{
		"again":            {ca, Issue{Node: "node-1"}, kind.Exists},
		"bad name":         {ca, Issue{Node: "Node 1"}, kind.Invalid},
		"bad address":      {ca, Issue{Node: "n", Addresses: []string{"a/b"}}, kind.Invalid},
		"too long":         {ca, Issue{Node: "n", Days: MaxDays + 1}, kind.Invalid},
		"reserved":         {ca, Issue{Node: "ca"}, kind.Invalid},
		"no authority":     {filepath.Join(dir, "none"), Issue{Node: "n"}, kind.NotFound},
		"two authorities":  {other, Issue{Node: "n"}, kind.Exists},
		"key of another's": {mixed(t, ca, other), Issue{Node: "n2"}, kind.Invalid},
	} {
		if _, err := New(c.ca, out, c.issue, now); !errors.Is(err, c.kind) {
			t.Errorf("%s: got %v, want %s", name, err, c.kind)
		}
	}
	again, err := os.ReadFile(filepath.Join(out, "node-1.key"))
	if err != nil || string(again) != string(key) {
		t.Errorf("an existing key was written over: %v", err)
	}
}

// mixed is an authority with the key of another.
func mixed(t *testing.T, a, b string) string {
	t.Helper()
	dir := t.TempDir()
	for name, from := range map[string]string{AuthorityCertificate: a, AuthorityKey: b} {
		raw, err := os.ReadFile(filepath.Join(from, name))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
