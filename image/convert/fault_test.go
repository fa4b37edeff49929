package convert

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/keeper"
	"github.com/thaw-project/thaw/kind"
)

// fails converts and checks that it fails as it should, in words a person
// understands, and leaves nothing.
func fails(t *testing.T, s *server, h *hub, o Options, want kind.Kind, words ...string) error {
	t.Helper()
	before := len(fds(t))
	_, err := Convert(t.Context(), o)
	if kind.Of(err) != want {
		t.Errorf("error %v of kind %q, want kind %q", err, kind.Of(err), want)
	}
	for _, w := range words {
		if err != nil && !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
	if err != nil && (strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), secret)) {
		t.Errorf("error %q has several lines or a secret", err)
	}
	if h != nil {
		h.setFault(nil)
		_, tag, _ := strings.Cut(strings.TrimPrefix(o.Dest, h.host), ":")
		if h.has("dest", tag) {
			t.Error("a failed conversion pushed a manifest")
		}
	}
	s.unfinished()
	images, lerr := s.client().ListImages(context.Background(), &attacherv1.ListImagesRequest{})
	must(t, lerr)
	if len(images.Images) > 0 {
		t.Errorf("a failed conversion recorded %v", images.Images)
	}
	if left, _ := os.ReadDir(o.SpoolDir); len(left) > 0 {
		t.Errorf("spool files were left: %v", left)
	}
	for _, f := range fds(t) {
		if strings.Contains(f, "(deleted)") && strings.HasPrefix(f, o.SpoolDir) {
			t.Errorf("spool file is still open: %s (%d descriptors before, %d now)", f, before, len(fds(t)))
		}
	}
	return err
}

func fds(t testing.TB) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	var out []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			out = append(out, to)
		}
	}
	return out
}

// secret is in credentials and in what a hostile registry says.
const secret = "s3cr3t-t0ken"

// TestHostileRegistry: each fault is one clear error and nothing is left.
func TestHostileRegistry(t *testing.T) {
	p := small(1, 3)
	var m ocispec.Manifest
	must(t, json.Unmarshal(p.blobs[p.root.Digest], &m))
	second := m.Layers[1].Digest
	blob := func(f func(w http.ResponseWriter, r *http.Request, raw []byte)) func(http.ResponseWriter, *http.Request, http.Handler) bool {
		return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+second.String()) {
				return false
			}
			f(w, r, p.blobs[second])
			return true
		}
	}
	cases := []struct {
		name  string
		fault func(w http.ResponseWriter, r *http.Request, next http.Handler) bool
		kind  kind.Kind
		words []string
	}{
		{"truncated blob", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Write(raw[:len(raw)/2]) // and again when asked for the rest
		}), kind.Corrupt, []string{"layer 2 of 3", second.String(), "truncated"}},
		{"truncated, with ranges", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(raw[:len(raw)/2]))
		}), kind.Corrupt, []string{"layer 2 of 3", second.String()}},
		{"wrong bytes", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			raw = bytes.Clone(raw)
			raw[len(raw)/2] ^= 1
			w.Write(raw)
		}), kind.Corrupt, []string{"layer 2 of 3", second.String(), "digest sha256:"}},
		{"another blob", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Write(p.blobs[m.Layers[0].Digest])
		}), kind.Corrupt, []string{"layer 2 of 3", second.String()}},
		{"endless blob", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.Write(raw)
			w.Write(make([]byte, 1<<20))
		}), kind.Corrupt, []string{"layer 2 of 3", second.String(), "longer"}},
		{"blob gone", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprintf(w, `{"errors":[{"code":"BLOB_UNKNOWN","message":"no\u001b[31m such\nthing"}]}`)
		}), kind.NotFound, []string{"layer 2 of 3", second.String()}},
		{"server error", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			http.Error(w, strings.Repeat("x", 1<<20), http.StatusInternalServerError)
		}), kind.Unavailable, []string{"layer 2 of 3", second.String(), "500"}},
		{"redirect with a secret to nowhere", blob(func(w http.ResponseWriter, r *http.Request, raw []byte) {
			http.Redirect(w, r, "http://127.0.0.1:1/blob?X-Signature="+secret, http.StatusTemporaryRedirect)
		}), kind.Unavailable, []string{second.String(), "127.0.0.1:1"}},
		{"manifest of another digest", func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodGet {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			w.Write([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"digest":"sha256:zz"}}`))
			return true
		}, kind.Invalid, []string{"digest"}},
		{"schema 1", func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodGet {
				return false
			}
			w.Header().Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
			w.Write([]byte(`{"schemaVersion":1,"name":"x"}`))
			return true
		}, kind.Unsupported, []string{"schema 1"}},
		{"endless manifest", func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodGet {
				return false
			}
			w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
			for range 100 {
				w.Write(make([]byte, 1<<20))
			}
			return true
		}, kind.Invalid, []string{"larger than"}},
		{"push refused at the end", func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") || r.Method != http.MethodPut {
				return false
			}
			http.Error(w, "no", http.StatusForbidden)
			return true
		}, kind.Denied, []string{"push manifest"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h, s := newHub(t), newServer(t)
			o := options(s, h.push(p, "source", "1"), h.host+"/dest:thaw")
			h.setFault(c.fault)
			fails(t, s, h, o, c.kind, c.words...)
			// What is good about it is reused once the registry works.
			h.setFault(nil)
			r := convert(t, o)
			if reused := r.Images[0].Layers[0].Reused; !reused && strings.Contains(c.words[0], "layer 2") {
				t.Error("the first layer's block was not reused")
			}
		})
	}
}

// TestFlakyRegistry: a registry that drops connections costs time only.
func TestFlakyRegistry(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	var mu sync.Mutex
	p := small(1, 3)
	h, s := newHub(t), newServer(t)
	o := options(s, h.push(p, "source", "1"), h.host+"/dest:thaw")
	drops := 0
	h.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		_, d, ok := strings.Cut(r.URL.Path, "/blobs/")
		if !ok || r.Method != http.MethodGet {
			return false
		}
		mu.Lock()
		n := random.Intn(200_000)
		mu.Unlock()
		raw := p.blobs[digest.Digest(d)]
		offset := 0
		if v, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			offset, _ = strconv.Atoi(strings.TrimSuffix(v, "-"))
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, len(raw)-1, len(raw)))
		}
		if offset > 0 {
			w.WriteHeader(http.StatusPartialContent)
		}
		if rest := raw[offset:]; len(rest) > n {
			mu.Lock()
			drops++
			mu.Unlock()
			w.Header().Set("Content-Length", strconv.Itoa(len(rest)))
			w.Write(rest[:n])
			panic(http.ErrAbortHandler)
		}
		w.Write(raw[offset:])
		return true
	})
	r := convert(t, o)
	h.setFault(nil)
	checkManifest(t, h, p, r, "dest", block.ModeOverlayfs, block.Erofs)
	t.Logf("%d dropped connections", drops)
}

// TestBadImages: images that contradict themselves or that nobody can convert.
func TestBadImages(t *testing.T) {
	edit := func(p *picture, config func(*ocispec.Image), manifest func(*ocispec.Manifest)) *picture {
		var m ocispec.Manifest
		must(t, json.Unmarshal(p.blobs[p.root.Digest], &m))
		var c ocispec.Image
		must(t, json.Unmarshal(p.blobs[m.Config.Digest], &c))
		config(&c)
		raw, err := json.Marshal(c)
		must(t, err)
		delete(p.blobs, p.root.Digest)
		delete(p.manifests, p.root.Digest)
		m.Config = p.blob(m.Config.MediaType, raw)
		manifest(&m)
		p.manifest(m.MediaType, m)
		return p
	}
	asIs := func(*ocispec.Image) {}
	tarImage := func(tar []byte) *picture {
		p := newPicture()
		p.image(runtime.GOARCH, []testLayer{{tar, "gzip"}})
		return p
	}
	bomb := func() *picture { // 1.5 GiB of zeros in a few bytes, in a block of 1 GiB
		p := newPicture()
		p.image(runtime.GOARCH, []testLayer{{make([]byte, 3<<29), "zstd"}})
		return p
	}
	cases := []struct {
		name    string
		picture *picture
		kind    kind.Kind
		words   []string
	}{
		{"wrong diff id", edit(small(1, 2), func(c *ocispec.Image) { c.RootFS.DiffIDs[1] = digest.FromString("x") }, func(*ocispec.Manifest) {}),
			kind.Corrupt, []string{"layer 2 of 2", "diff id", digest.FromString("x").String()}},
		{"too few diff ids", edit(small(1, 2), func(c *ocispec.Image) { c.RootFS.DiffIDs = c.RootFS.DiffIDs[:1] }, func(*ocispec.Manifest) {}),
			kind.Corrupt, []string{"2 layers", "names 1"}},
		{"no layers", edit(small(1, 1), func(c *ocispec.Image) { c.RootFS.DiffIDs = nil }, func(m *ocispec.Manifest) { m.Layers = nil }),
			kind.Unsupported, []string{"no layers"}},
		{"foreign layer", edit(small(1, 2), asIs, func(m *ocispec.Manifest) {
			m.Layers[0].MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
		}), kind.Unsupported, []string{"foreign"}},
		{"layer with urls", edit(small(1, 2), asIs, func(m *ocispec.Manifest) { m.Layers[0].URLs = []string{"http://elsewhere"} }),
			kind.Unsupported, []string{"foreign"}},
		{"encrypted layer", edit(small(1, 2), asIs, func(m *ocispec.Manifest) { m.Layers[1].MediaType += "+encrypted" }),
			kind.Unsupported, []string{"encrypted"}},
		{"artifact", edit(small(1, 1), asIs, func(m *ocispec.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" }),
			kind.Unsupported, []string{"no container image"}},
		{"size that lies", edit(small(1, 2), asIs, func(m *ocispec.Manifest) { m.Layers[1].Size += 5 }),
			kind.Corrupt, []string{"layer 2 of 2"}},
		{"dotdot", tarImage(torture.NewBuilder().File("../evil", []byte("x")).Tar()), kind.Invalid, []string{"layer 1 of 1", "../evil"}},
		{"absolute", tarImage(torture.NewBuilder().File("/etc/evil", []byte("x")).Tar()), kind.Invalid, []string{"layer 1 of 1", "/etc/evil"}},
		{"not a tar", tarImage(torture.Data(7, 100_000)), kind.Corrupt, []string{"layer 1 of 1"}},
		{"decompression bomb", bomb(), "", []string{"layer 1 of 1"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h, s := newHub(t), newServer(t)
			o := options(s, "oci:"+c.picture.layout(t, "x"), h.host+"/dest:thaw")
			if c.kind == "" {
				_, err := Convert(t.Context(), o)
				if k := kind.Of(err); k != kind.Invalid && k != kind.Corrupt {
					t.Errorf("error %v of kind %q", err, k)
				}
				s.unfinished()
				return
			}
			fails(t, s, h, o, c.kind, c.words...)
		})
	}
}

// TestUnknownReference and friends: what a user gets wrong.
func TestWrongInput(t *testing.T) {
	h, s := newHub(t), newServer(t)
	good := h.push(small(1, 1), "source", "1")
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("no archive"), 0o644))
	for _, c := range []struct {
		source, dest string
		kind         kind.Kind
	}{
		{h.host + "/source:2", h.host + "/dest:thaw", kind.NotFound},
		{h.host + "/nothing:1", h.host + "/dest:thaw", kind.NotFound},
		{"127.0.0.1:1/source:1", h.host + "/dest:thaw", kind.Unavailable},
		{"UPPER/case:1", h.host + "/dest:thaw", kind.Invalid},
		{"oci:" + dir + "/nothing", h.host + "/dest:thaw", kind.NotFound},
		{"oci:" + dir, h.host + "/dest:thaw", kind.NotFound},
		{"oci-archive:" + dir + "/file", h.host + "/dest:thaw", kind.Corrupt},
		{"docker-archive:" + dir + "/nothing", h.host + "/dest:thaw", kind.NotFound},
		{"docker-archive:" + dir, h.host + "/dest:thaw", kind.Invalid},
		{good, h.host + "/dest@" + digest.FromString("x").String(), kind.Invalid},
		{good, "127.0.0.1:1/dest:thaw", kind.Unavailable},
		{good, "oci:" + dir, kind.Invalid},
		{good, "docker-archive:" + dir, kind.Invalid},
		{"192.0.2.1.nip.invalid/source:1", h.host + "/dest:thaw", kind.Unavailable},
	} {
		t.Run(strings.ReplaceAll(c.source+" "+c.dest, "/", "_"), func(t *testing.T) {
			fails(t, s, nil, options(s, c.source, c.dest), c.kind)
		})
	}
}

// TestCredentials: basic authentication from docker's config.json, a credential
// helper, none and wrong ones.
func TestCredentials(t *testing.T) {
	h, s := newHub(t), newServer(t)
	source := h.push(small(1, 1), "source", "1")
	h.setFault(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if user, password, _ := r.BasicAuth(); user == "me" && password == secret {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
		return true
	})
	config := func(c string) string {
		dir := t.TempDir()
		must(t, os.WriteFile(filepath.Join(dir, "config.json"), []byte(c), 0o600))
		return dir
	}
	auths := func(password string) string {
		return config(fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, h.host, base64.StdEncoding.EncodeToString([]byte("me:"+password))))
	}
	helpers := t.TempDir()
	must(t, os.WriteFile(filepath.Join(helpers, "docker-credential-thawtest"), []byte("#!/bin/sh\ncat >/dev/null\nprintf '{\"Username\":\"me\",\"Secret\":\""+secret+"\"}'\n"), 0o755))
	t.Setenv("PATH", helpers+":"+os.Getenv("PATH"))
	o := options(s, source, h.host+"/dest:thaw")
	for name, dir := range map[string]string{"none": t.TempDir(), "wrong": auths(secret + "x"), "helper absent": config(fmt.Sprintf(`{"credHelpers":{%q:"absent"}}`, h.host))} {
		o.DockerConfigDir = dir
		t.Run(name, func(t *testing.T) { fails(t, s, nil, o, kind.Denied) })
	}
	o.DockerConfigDir = config(`{"auths":{"` + secret)
	t.Run("damaged", func(t *testing.T) { fails(t, s, nil, o, kind.Invalid, "cannot be read") })
	for name, dir := range map[string]string{"auths": auths(secret), "helper": config(fmt.Sprintf(`{"credHelpers":{%q:"thawtest"}}`, h.host))} {
		o.DockerConfigDir = dir
		t.Run(name, func(t *testing.T) { convert(t, o) })
	}
}

// TestFullSpool and TestFullStore: no space is one clear error.
func TestFullSpool(t *testing.T) {
	needRoot(t)
	h, s := newHub(t), newServer(t)
	o := options(s, h.push(small(1, 3), "source", "1"), h.host+"/dest:thaw")
	o.SpoolDir = tmpfs(t, 200<<10)
	fails(t, s, h, o, kind.NoSpace, "spool", o.SpoolDir)
}

func TestFullStore(t *testing.T) {
	needRoot(t)
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			h := newHub(t)
			s := newServerIn(t, tmpfs(t, 3<<20))
			p := newPicture()
			p.image(runtime.GOARCH, []testLayer{{torture.NewBuilder().File("big", torture.Data(1, 16<<20)).Tar(), "gzip"}})
			o := options(s, h.push(p, "source", "1"), h.host+"/dest:thaw")
			o.Mode, o.Filesystem = v.mode, v.fs
			fails(t, s, h, o, kind.NoSpace, "layer 1 of 1", "no space left")
		})
	}
}

func tmpfs(t testing.TB, sizeBytes int) string {
	t.Helper()
	at := t.TempDir()
	must(t, unix.Mount("tmpfs", at, "tmpfs", 0, fmt.Sprintf("size=%d", sizeBytes)))
	t.Cleanup(func() {
		if err := unix.Unmount(at, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return at
}

// TestCancel cancels at random moments: nothing is left, and the next run finishes
// with what is done.
func TestCancel(t *testing.T) {
	needRoot(t)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	p := small(1, 8)
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			h, s := newHub(t), newServer(t)
			source := h.push(p, "source", "1")
			slow(h, 4*time.Millisecond)
			for range 5 {
				o := options(s, source, h.host+"/dest:thaw")
				o.Mode, o.Filesystem = v.mode, v.fs
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(random.Intn(350))*time.Millisecond)
				_, err := Convert(ctx, o)
				cancel()
				if err != nil && kind.Of(err) != kind.Canceled {
					t.Errorf("error %v, want kind canceled", err)
				}
				s.unfinished()
			}
			h.setFault(nil)
			o := options(s, source, h.host+"/dest:thaw")
			o.Mode, o.Filesystem = v.mode, v.fs
			checkManifest(t, h, p, convert(t, o), "dest", v.mode, v.fs)
			s.unfinished()
		})
	}
}

// slow makes blobs trickle.
func slow(h *hub, pause time.Duration) {
	h.setFault(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		next.ServeHTTP(&trickle{w, pause}, r)
		return true
	})
}

type trickle struct {
	http.ResponseWriter
	pause time.Duration
}

func (t *trickle) Write(p []byte) (int, error) {
	total := 0
	for len(p) > 0 {
		n, err := t.ResponseWriter.Write(p[:min(len(p), 4096)])
		total += n
		if err != nil {
			return total, err
		}
		t.ResponseWriter.(http.Flusher).Flush()
		time.Sleep(t.pause)
		p = p[n:]
	}
	return total, nil
}

// TestTwoAtOnce: conversions of one image at the same time write each block once.
func TestTwoAtOnce(t *testing.T) {
	h, s := newHub(t), newServer(t)
	p := small(1, 3)
	source := h.push(p, "source", "1")
	slow(h, time.Millisecond)
	var wg sync.WaitGroup
	results := make([]Result, 4)
	for i := range results {
		o := options(s, source, h.host+"/dest:thaw"+fmt.Sprint(i))
		wg.Go(func() {
			var err error
			if results[i], err = Convert(t.Context(), o); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	written := 0
	for _, r := range results {
		if t.Failed() {
			return
		}
		if r.Digest != results[0].Digest {
			t.Errorf("digests %s and %s", r.Digest, results[0].Digest)
		}
		for _, l := range r.Images[0].Layers {
			if !l.Reused {
				written++
			}
		}
	}
	if written != 3 {
		t.Errorf("%d blocks were written for 3 layers", written)
	}
	s.unfinished()
}

// TestServerRestarts: the attacher goes away and comes back in the middle.
func TestServerRestarts(t *testing.T) {
	h, s := newHub(t), newServer(t)
	p := small(1, 4)
	o := options(s, h.push(p, "source", "1"), h.host+"/dest:thaw")
	slow(h, 20*time.Millisecond)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	restarts := 0
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(700 * time.Millisecond):
				s.stop()
				time.Sleep(300 * time.Millisecond)
				s.start()
				restarts++
			}
		}
	})
	r, err := Convert(t.Context(), o)
	close(stop)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	checkManifest(t, h, p, r, "dest", block.ModeOverlayfs, block.Erofs)
	t.Logf("%d restarts", restarts)
	s.unfinished()
}

// TestBlockRemovedMeanwhile: a finished block disappears before what builds on it.
func TestBlockRemovedMeanwhile(t *testing.T) {
	h, s := newHub(t), newServer(t)
	o := options(s, h.push(small(1, 2), "source", "1"), h.host+"/dest:thaw")
	removed := false
	o.Progress = func(e Event) {
		if e.Index == 0 && e.State == StateWritten && !removed {
			removed = true
			if _, err := o.Attacher.DeleteLvol(context.Background(), &attacherv1.DeleteLvolRequest{Name: e.Block}); err != nil {
				t.Error(err)
			}
		}
	}
	convert(t, o)
	if !removed {
		t.Error("nothing was removed")
	}
}

const childEnv = "THAW_TEST_CONVERT"

// TestMain is also the processes that tests kill.
func TestMain(m *testing.M) {
	if dir := os.Getenv(storeEnv); dir != "" && len(os.Args) > 1 && os.Args[1] != keeperArg {
		if err := storeMain(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) > 2 && os.Args[1] == keeperArg {
		if err := keeper.Run(context.Background(), keeper.Options{Socket: os.Args[2]}); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if raw := os.Getenv(childEnv); raw != "" {
		child(raw)
	}
	os.Exit(m.Run())
}

type childArgs struct {
	Socket, Source, Dest, SpoolDir, DockerConfigDir string
	Mode                                            block.Mode
	Filesystem                                      block.Filesystem
	VirtualSizeBytes                                int64
}

func child(raw string) {
	var a childArgs
	err := json.Unmarshal([]byte(raw), &a)
	if err == nil {
		conn, derr := dial(a.Socket)
		if derr != nil {
			fmt.Fprintln(os.Stderr, derr)
			os.Exit(1)
		}
		_, err = Convert(context.Background(), Options{
			Source: a.Source, Dest: a.Dest, SpoolDir: a.SpoolDir, DockerConfigDir: a.DockerConfigDir,
			Mode: a.Mode, Filesystem: a.Filesystem, VirtualSizeBytes: a.VirtualSizeBytes,
			Attacher: attacherv1.NewAttacherClient(conn), Builders: builders,
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// TestKill kills converters with SIGKILL at random moments: nothing is left, and
// what is done is reused.
func TestKill(t *testing.T) {
	needRoot(t)
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewSource(seed))
	p := small(1, 8)
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			h, s := newHub(t), newServer(t)
			o := options(s, h.push(p, "source", "1"), h.host+"/dest:thaw")
			o.Mode, o.Filesystem = v.mode, v.fs
			slow(h, 4*time.Millisecond)
			raw, err := json.Marshal(childArgs{s.socket, o.Source, o.Dest, o.SpoolDir, o.DockerConfigDir, o.Mode, o.Filesystem, o.VirtualSizeBytes})
			must(t, err)
			before := 0
			for round := range 8 {
				cmd := exec.Command(os.Args[0], "-test.run=^$")
				cmd.Env = append(os.Environ(), childEnv+"="+string(raw))
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				must(t, cmd.Start())
				time.Sleep(time.Duration(random.Intn(450)) * time.Millisecond)
				cmd.Process.Kill()
				if err := cmd.Wait(); err != nil && !strings.Contains(err.Error(), "killed") {
					t.Fatalf("round %d: %v: %s", round, err, out.String())
				}
				s.unfinished()
				if n := len(s.names()); n < before {
					t.Errorf("round %d: %d blocks, %d before", round, n, before)
				} else {
					before = n
				}
				if left, _ := os.ReadDir(o.SpoolDir); len(left) > 0 {
					t.Errorf("spool files were left: %v", left)
				}
			}
			h.setFault(nil)
			r := convert(t, o)
			reused := 0
			for _, l := range r.Images[0].Layers {
				if l.Reused {
					reused++
				}
			}
			t.Logf("%d lvols after the kills, %d layers reused", before, reused)
			checkManifest(t, h, p, r, "dest", v.mode, v.fs)
		})
	}
}

// TestMemory: a layer a hundred times as large does not take more memory.
func TestMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("streams 600 MB")
	}
	dir := t.TempDir()
	p := newPicture()
	raw, err := io.ReadAll(torture.Synthetic(600, 1<<20))
	must(t, err)
	p.image(runtime.GOARCH, []testLayer{{raw, ""}})
	layout := p.layout(t, "x")
	p, raw = nil, nil
	runtime.GC()
	var base runtime.MemStats
	runtime.ReadMemStats(&base)
	stop, done := make(chan struct{}), make(chan uint64)
	go func() {
		var peak uint64
		for {
			select {
			case <-stop:
				done <- peak
				return
			case <-time.After(5 * time.Millisecond):
				var m runtime.MemStats
				runtime.ReadMemStats(&m)
				peak = max(peak, m.HeapAlloc)
			}
		}
	}()
	s := newServer(t)
	r := convert(t, options(s, "oci:"+layout, "oci:"+dir+"/out:x"))
	close(stop)
	peak := <-done
	over := int64(peak) - int64(base.HeapAlloc)
	t.Logf("%d MiB of layer, %d MiB of heap at most", r.Images[0].Layers[0].AppliedBytes>>20, over>>20)
	if over > 96<<20 {
		t.Errorf("conversion took %d MiB of heap", over>>20)
	}
}
