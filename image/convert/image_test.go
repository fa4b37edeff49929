package convert

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/layer/torture"
)

func listen(t testing.TB, socket string) net.Listener {
	t.Helper()
	os.Remove(socket)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// picture is an image made for a test: blobs and manifests by digest.
type picture struct {
	root      ocispec.Descriptor
	manifests map[digest.Digest]ocispec.Descriptor
	blobs     map[digest.Digest][]byte // manifests too
}

func newPicture() *picture {
	return &picture{manifests: map[digest.Digest]ocispec.Descriptor{}, blobs: map[digest.Digest][]byte{}}
}

func (p *picture) blob(mediaType string, raw []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
	p.blobs[d.Digest] = raw
	return d
}

func (p *picture) manifest(mediaType string, v any) ocispec.Descriptor {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	d := p.blob(mediaType, raw)
	p.manifests[d.Digest] = d
	p.root = d
	return d
}

// compression of a layer in a picture.
type compression string

func (c compression) pack(raw []byte) (string, []byte) {
	var b bytes.Buffer
	switch c {
	case "gzip":
		z := gzip.NewWriter(&b)
		z.Write(raw)
		z.Close()
		return ocispec.MediaTypeImageLayerGzip, b.Bytes()
	case "zstd":
		z, _ := zstd.NewWriter(&b)
		z.Write(raw)
		z.Close()
		return ocispec.MediaTypeImageLayerZstd, b.Bytes()
	}
	return ocispec.MediaTypeImageLayer, raw
}

type testLayer struct {
	tar  []byte
	with compression
}

// image adds an image and returns its manifest's descriptor.
func (p *picture) image(arch string, layers []testLayer) ocispec.Descriptor {
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}}
	config.Config.Cmd = []string{"/<unescaped>&"}
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for i, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l.tar))
		mediaType, packed := l.with.pack(l.tar)
		d := p.blob(mediaType, packed)
		d.Annotations = map[string]string{"org.example.layer": fmt.Sprint("<", i, ">")}
		m.Layers = append(m.Layers, d)
	}
	config.RootFS.Type = "layers"
	raw, err := json.Marshal(config)
	if err != nil {
		panic(err)
	}
	m.Config = p.blob(ocispec.MediaTypeImageConfig, raw)
	m.Annotations = map[string]string{"org.example.image": "kept"}
	return p.manifest(ocispec.MediaTypeImageManifest, m)
}

// index adds an index of the manifests.
func (p *picture) index(manifests ...ocispec.Descriptor) {
	p.manifest(ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: manifests,
		Annotations: map[string]string{"org.example.index": "kept"},
	})
}

// tortured is an image with every case, in all compressions.
func tortured() *picture {
	p := newPicture()
	var layers []testLayer
	for i, l := range torture.Stack() {
		layers = append(layers, testLayer{l.Tar, []compression{"gzip", "zstd", ""}[i%3]})
	}
	p.image(runtime.GOARCH, layers)
	return p
}

// small is an image of n layers, each with a file of its own and one they share.
func small(seed int64, n int) *picture {
	p := newPicture()
	p.image(runtime.GOARCH, smallLayers(seed, n))
	return p
}

func smallLayers(seed int64, n int) []testLayer {
	var layers []testLayer
	for i := range n {
		b := torture.NewBuilder().Dir("d").File(fmt.Sprint("d/", i), torture.Data(seed+int64(i), 300_000)).File("last", []byte(fmt.Sprint(i)))
		layers = append(layers, testLayer{b.Tar(), "gzip"})
	}
	return layers
}

// layout writes p as an OCI layout with one tag.
func (p *picture) layout(t testing.TB, tag string) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o755))
	for d, raw := range p.blobs {
		must(t, os.WriteFile(filepath.Join(dir, "blobs/sha256", d.Encoded()), raw, 0o644))
	}
	root := p.root
	root.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{root}})
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "index.json"), index, 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644))
	return dir
}

// tarOf packs a directory.
func tarOf(t testing.TB, dir string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "archive.tar")
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	w := tar.NewWriter(f)
	must(t, w.AddFS(os.DirFS(dir)))
	must(t, w.Close())
	return name
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// hub is a registry with faults.
type hub struct {
	t    testing.TB
	http *httptest.Server
	host string

	mu    sync.Mutex
	fault func(w http.ResponseWriter, r *http.Request, next http.Handler) bool // guarded by mu: true if it answered
	gets  map[string]int                                                       // guarded by mu: blob fetches by digest
}

func newHub(t testing.TB) *hub {
	t.Helper()
	h := &hub{t: t, gets: map[string]int{}}
	inner := registry.New(registry.Logger(discardLog))
	h.http = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		fault := h.fault
		if i := strings.Index(r.URL.Path, "/blobs/sha256:"); i >= 0 && r.Method == http.MethodGet {
			h.gets[r.URL.Path[i+len("/blobs/"):]]++
		}
		h.mu.Unlock()
		if fault == nil || !fault(w, r, inner) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(h.http.Close)
	h.host = strings.TrimPrefix(h.http.URL, "http://")
	return h
}

func (h *hub) setFault(f func(w http.ResponseWriter, r *http.Request, next http.Handler) bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = f
}

func (h *hub) fetched() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	n := 0
	for _, c := range h.gets {
		n += c
	}
	return n
}

func (h *hub) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.gets)
}

// push stores p under repository:tag and returns the reference.
func (h *hub) push(p *picture, repository, tag string) string {
	h.t.Helper()
	return pushTo(h.t, http.DefaultClient, h.http.URL, p, repository, tag)
}

func pushTo(t testing.TB, client *http.Client, base string, p *picture, repository, tag string) string {
	t.Helper()
	do := func(method, u, contentType string, body []byte, want int) *http.Response {
		t.Helper()
		req, err := http.NewRequest(method, u, bytes.NewReader(body))
		must(t, err)
		req.Header.Set("Content-Type", contentType)
		resp, err := client.Do(req)
		must(t, err)
		said, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Fatalf("%s %s: %s: %s", method, u, resp.Status, said)
		}
		return resp
	}
	for d, raw := range p.blobs {
		if _, ok := p.manifests[d]; ok {
			continue
		}
		resp := do(http.MethodPost, base+"/v2/"+repository+"/blobs/uploads/", "", nil, http.StatusAccepted)
		location, err := resp.Location()
		must(t, err)
		q := location.Query()
		q.Set("digest", d.String())
		location.RawQuery = q.Encode()
		do(http.MethodPut, location.String(), "application/octet-stream", raw, http.StatusCreated)
	}
	// An index after what it names.
	for _, wantIndex := range []bool{false, true} {
		for d, desc := range p.manifests {
			if isIndex(desc.MediaType) == wantIndex {
				do(http.MethodPut, base+"/v2/"+repository+"/manifests/"+d.String(), desc.MediaType, p.blobs[d], http.StatusCreated)
			}
		}
	}
	do(http.MethodPut, base+"/v2/"+repository+"/manifests/"+tag, p.root.MediaType, p.blobs[p.root.Digest], http.StatusCreated)
	u, err := url.Parse(base)
	must(t, err)
	return u.Host + "/" + repository + ":" + tag
}

// get fetches a manifest (by tag or digest) or, with blob, a blob.
func (h *hub) get(repository, what string, blob bool) ([]byte, http.Header) {
	h.t.Helper()
	raw, header, err := fetch(http.DefaultClient, h.http.URL, repository, what, blob)
	must(h.t, err)
	return raw, header
}

func fetch(client *http.Client, base, repository, what string, blob bool) ([]byte, http.Header, error) {
	class := "manifests"
	if blob {
		class = "blobs"
	}
	req, err := http.NewRequest(http.MethodGet, base+"/v2/"+repository+"/"+class+"/"+what, nil)
	if err != nil {
		return nil, nil, err
	}
	req.Header["Accept"] = []string{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, dockerManifest, dockerList}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s %s: %s", class, what, resp.Status)
	}
	return raw, resp.Header, err
}

func (h *hub) has(repository, tag string) bool {
	_, _, err := fetch(http.DefaultClient, h.http.URL, repository, tag, false)
	return err == nil
}
