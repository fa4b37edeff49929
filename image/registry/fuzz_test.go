package registry

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"

	"github.com/thaw-project/thaw/kind"
)

// legible checks an error for a person: it has a kind, is one line of bounded length
// and tells no secret.
func legible(t *testing.T, err error) {
	t.Helper()
	if kind.Of(err) == "" {
		t.Errorf("no kind: %v", err)
	}
	if text := err.Error(); strings.ContainsAny(text, "\n\r\x1b\x00") || len(text) > 2000 || strings.Contains(text, secret) {
		t.Errorf("no line for a terminal, or a secret (%d bytes): %.300q", len(text), text)
	}
}

const secret = "s3cr3t-w0rd"

// answer is what a hostile registry says to all that is asked of it, but for how it
// wants to be spoken to.
type answer struct {
	status                            int
	contentType, contentRange, header string
	body                              string
}

// hostile is a registry whose answer is set for each input.
type hostile struct {
	*httptest.Server
	mu   sync.Mutex
	says answer // guarded by mu
}

func newHostile(f *testing.F) *hostile {
	h := &hostile{}
	h.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		a := h.says
		h.mu.Unlock()
		if r.URL.Path == "/v2/" {
			if a.header != "" {
				w.Header().Set("WWW-Authenticate", a.header)
				w.WriteHeader(http.StatusUnauthorized)
			}
			return
		}
		w.Header().Set("Content-Type", a.contentType)
		w.Header().Set("Content-Range", a.contentRange)
		w.WriteHeader(a.status)
		_, _ = io.WriteString(w, a.body)
	}))
	f.Cleanup(h.Close)
	return h
}

// FuzzAnswers: whatever a registry answers, a manifest that comes back has the digest
// it says, and a blob opens where it was asked to, or there is a clear error.
func FuzzAnswers(f *testing.F) {
	h := newHostile(f)
	f.Add(200, "application/vnd.oci.image.manifest.v1+json; charset=utf-8", "", "", `{"schemaVersion":2}`, int64(0))
	f.Add(206, "text/html", "bytes 5-9/10", "", "hello", int64(5))
	f.Add(206, "", "bytes 0-9/10", "", "hello", int64(5))
	f.Add(404, "application/json", "", "", `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no\u001b[31m\nsuch","detail":{"a":[1]}}]}`, int64(0))
	f.Add(401, "", "", `Bearer realm="http://127.0.0.1:1/token?x=`+secret+`",service="s"`, "", int64(0))
	f.Add(200, "", "", `Basic realm="x"`, "x", int64(0))
	f.Add(200, "", "", `Negotiate`, "x", int64(2))
	f.Add(418, "", "", "", strings.Repeat("x", 1000), int64(0))
	f.Add(416, "", "", "", "", int64(1<<40))
	f.Add(302, "", "", "", "", int64(0))
	host := strings.TrimPrefix(h.URL, "http://")
	empty := f.TempDir()
	f.Fuzz(func(t *testing.T, status int, contentType, contentRange, authenticate, body string, offset int64) {
		// Others close the connection before any header. 429 and 5xx are tried
		// again, with pauses, which fuzzing has no time for; so is 408.
		if status < 200 || status > 499 || status == 429 || status == 408 || offset < 0 || strings.Contains(authenticate, "://") && !strings.Contains(authenticate, "127.0.0.1:1/") {
			return
		}
		h.mu.Lock()
		h.says = answer{status, contentType, contentRange, authenticate, body}
		h.mu.Unlock()
		client, err := New(Options{PlainHTTP: true, DockerConfigDir: empty})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		ref, err := client.Parse(host + "/app:1")
		if err != nil {
			t.Fatal(err)
		}
		repository := client.Repository(ref.Context())
		d, raw, err := repository.Manifest(t.Context(), "1")
		if err != nil {
			legible(t, err)
		} else if d.Digest != digest.FromBytes(raw) || d.Size != int64(len(raw)) || string(raw) != body {
			t.Errorf("%+v for %q", d, raw)
		}
		other := digest.FromString(body + "x").String()
		if _, _, err := repository.Manifest(t.Context(), other); err == nil {
			t.Errorf("a manifest of another digest than %s", other)
		} else {
			legible(t, err)
		}
		r, err := repository.Blob(t.Context(), digest.FromString("blob"), offset)
		if err != nil {
			legible(t, err)
			return
		}
		defer r.Close()
		got, err := io.ReadAll(r)
		if err != nil {
			legible(t, err)
		}
		want := body
		if status != http.StatusPartialContent {
			want = body[min(offset, int64(len(body))):]
		} else if !strings.HasPrefix(contentRange, "bytes "+strconv.FormatInt(offset, 10)+"-") {
			t.Errorf("a range from %q was taken for one from %d", contentRange, offset)
		}
		if string(got) != want {
			t.Errorf("%q from %d, want %q", got, offset, want)
		}
	})
}

// FuzzDockerConfig: a config.json gives credentials or a clear error that does not
// repeat what is in it.
func FuzzDockerConfig(f *testing.F) {
	for _, s := range []string{
		`{"auths":{"registry.example":{"auth":"dXNlcjpzM2NyM3QtdzByZA=="}}}`,
		`{"auths":{"registry.example":{"auth":"` + secret + `"}}}`,
		`{"auths":{"registry.example":{"username":"u","password":"` + secret + `","identitytoken":"` + secret + `"}}}`,
		`{"auths":{"https://registry.example/v1/":{"auth":"Og=="}}`,
		`{"credsStore":"` + secret + `"}`, `{"credHelpers":{"registry.example":"x"}}`, `{"auths":[]}`, `[]`, ``, `{"auths":{"registry.example":null}}`,
	} {
		f.Add([]byte(s))
	}
	// A helper that a fuzzed file names must not be found.
	f.Setenv("PATH", "/none")
	repository, err := name.NewRepository("registry.example/app")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600); err != nil {
			t.Fatal(err)
		}
		auth, err := (&keychain{dir: dir}).Resolve(repository)
		if err != nil {
			if strings.Contains(err.Error(), "docker-credential-") { // names the helper, on purpose
				return
			}
			legible(t, err)
			return
		}
		if _, err := auth.Authorization(); err != nil {
			t.Errorf("credentials that cannot be used: %v", err)
		}
	})
}

// FuzzParse: what is taken for a reference reads back as itself.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"app", "a.b/c:d", "a:5000/b@sha256:" + strings.Repeat("0", 64), "UPPER", "a//b", "localhost/x:", "[::1]:5/x", "a b", "\x1b[31m"} {
		f.Add(s)
	}
	client, err := New(Options{})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ref, err := client.Parse(s)
		if err != nil {
			legible(t, err)
			return
		}
		if len(ref.Context().Name()) > 255 {
			return // the library below adds a default registry after it counted
		}
		again, err := client.Parse(ref.Name())
		if err != nil || again.Name() != ref.Name() {
			t.Errorf("%q is %q, which is %v (%v)", s, ref.Name(), again, err)
		}
	})
}
