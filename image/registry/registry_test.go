package registry

import (
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/thaw-project/thaw/kind"
)

// TestCertificates: a registry whose certificate nobody vouches for is not spoken to,
// with TLS or without, until its authority is named.
func TestCertificates(t *testing.T) {
	asked := 0
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked++; r.URL.Path != "/v2/" {
			w.Write([]byte(`{"schemaVersion":2}`))
		}
	}))
	defer server.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		options Options
		works   bool
	}{{Options{}, false}, {Options{PlainHTTP: true}, false}, {Options{CAFile: ca}, true}} {
		client, err := New(c.options)
		if err != nil {
			t.Fatal(err)
		}
		ref, err := client.Parse(strings.TrimPrefix(server.URL, "https://") + "/app:1")
		if err != nil {
			t.Fatal(err)
		}
		asked = 0
		_, _, err = client.Repository(ref.Context()).Manifest(t.Context(), "1")
		switch {
		case c.works && err != nil:
			t.Errorf("%+v: %v", c.options, err)
		case !c.works && (kind.Of(err) != kind.Denied || !strings.Contains(err.Error(), "--ca-file") || asked > 0):
			t.Errorf("%+v: asked %d times, %v of kind %q", c.options, asked, err, kind.Of(err))
		}
		client.Close()
	}
}

func TestDockerConfigThatCannotBe(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(file, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]kind.Kind{"/none": kind.NotFound, file: kind.Invalid, filepath.Dir(file): ""} {
		if _, err := New(Options{DockerConfigDir: dir}); kind.Of(err) != want || (err == nil) != (want == "") {
			t.Errorf("%s: %v of kind %q, want %q", dir, err, kind.Of(err), want)
		}
	}
}
