package e2e

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// tarEntry is an entry of a layer, well-formed or not.
type tarEntry struct {
	header tar.Header
	body   []byte
}

func file(name string, body []byte) tarEntry {
	return tarEntry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(body))}, body}
}

func dir(name string) tarEntry {
	return tarEntry{header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: 0o755}}
}

// tarball is a layer of these entries. One whose size is not that of its body ends the
// archive.
func tarball(entries ...tarEntry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if err := w.WriteHeader(&e.header); err != nil {
			panic(err) // the test's own mistake
		}
		if _, err := w.Write(e.body); err != nil {
			panic(err)
		}
		if e.header.Size != int64(len(e.body)) {
			return append(b.Bytes(), make([]byte, 1024)...)
		}
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// noise is a layer with a file that does not compress.
func noise(seed uint64, size int) []byte {
	body := make([]byte, size)
	source := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), 42})
	_, _ = source.Read(body)
	return tarball(file(fmt.Sprintf("noise-%d", seed), body))
}

// layout is an OCI image layout that is written field by field, so that each can be
// wrong.
type layout struct {
	t   *testing.T
	dir string
}

func newLayout(t *testing.T) *layout {
	t.Helper()
	l := &layout{t, filepath.Join(t.TempDir(), "layout")}
	if err := os.MkdirAll(filepath.Join(l.dir, "blobs/sha256"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(l.dir, ocispec.ImageLayoutFile), `{"imageLayoutVersion":"1.0.0"}`)
	return l
}

func (l *layout) blob(mediaType string, content []byte) ocispec.Descriptor {
	l.t.Helper()
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(content), Size: int64(len(content))}
	writeFile(l.t, filepath.Join(l.dir, "blobs/sha256", d.Digest.Encoded()), string(content))
	return d
}

// image writes the blobs of an image of one layer and returns its manifest.
func (l *layout) image(layer []byte) ocispec.Manifest {
	l.t.Helper()
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}}
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	m.Config = l.blob(ocispec.MediaTypeImageConfig, l.json(config))
	m.Layers = []ocispec.Descriptor{l.blob(ocispec.MediaTypeImageLayer, layer)}
	return m
}

func (l *layout) json(v any) []byte {
	l.t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return raw
}

// root makes the bytes the layout's image and returns the source to convert.
func (l *layout) root(mediaType string, manifest []byte) string {
	l.t.Helper()
	index := ocispec.Index{Manifests: []ocispec.Descriptor{l.blob(mediaType, manifest)}}
	index.SchemaVersion = 2
	writeFile(l.t, filepath.Join(l.dir, ocispec.ImageIndexFile), string(l.json(index)))
	return "oci:" + l.dir
}

// edited is the source of an image of one small layer whose manifest was changed.
func edited(t *testing.T, edit func(l *layout, m *ocispec.Manifest)) string {
	t.Helper()
	l := newLayout(t)
	m := l.image(tarball(file("a", []byte(t.Name()))))
	edit(l, &m)
	return l.root(ocispec.MediaTypeImageManifest, l.json(m))
}

// badImages: images that are damaged, contradict themselves or attack.
func (b *bench) badImages(t *testing.T) {
	g := b.ground(t)

	// What is wrong in the storage of the registry, it serves.
	truncated := g.pushLayers(t, "truncated", noise(20, 1<<20))
	g.harm(t, truncated, 0, func(blob []byte) []byte { return blob[:len(blob)/2] })
	flipped := g.pushLayers(t, "flipped", noise(21, 1<<20))
	g.harm(t, flipped, 0, func(blob []byte) []byte { blob[len(blob)/2] ^= 1; return blob })
	longer := g.pushLayers(t, "longer", noise(22, 1<<20))
	g.harm(t, longer, 0, func(blob []byte) []byte { return append(blob, blob...) })
	gone := g.pushLayers(t, "gone", noise(23, 1<<20))
	g.harm(t, gone, 0, func([]byte) []byte { return nil })
	config := g.pushLayers(t, "config", noise(24, 1<<20))
	g.harm(t, config, -1, func(blob []byte) []byte { blob[len(blob)/2] ^= 1; return blob })

	hostile := func(name string, entries ...tarEntry) string { return g.pushLayers(t, name, tarball(entries...)) }
	eight := tarEntry{header: tar.Header{Typeflag: tar.TypeReg, Name: "huge", Mode: 0o644, Size: math.MaxInt64, Format: tar.FormatGNU}}
	convert := func(source string, more ...string) []string { return g.convertArgs(source, "bad-dest", more...) }

	cases := []bad{
		{name: "truncated blob", args: convert(truncated), code: exitCorrupt, says: []string{"layer 1 of 1", "sha256:", "truncated", "push it again"}},
		{name: "digest mismatch", args: convert(flipped), code: exitCorrupt, says: []string{"layer 1 of 1", "the bytes have digest", "push it again"}},
		{name: "blob longer than its size", args: convert(longer), code: exitCorrupt, says: []string{"layer 1 of 1", "longer than", "push it again"}},
		{name: "blob that is gone", args: convert(gone), code: exitNotFound, says: []string{"layer 1 of 1", "sha256:"}},
		{name: "digest mismatch of the configuration", args: convert(config), code: exitCorrupt, says: []string{"image configuration sha256:"}},
	}
	for _, fs := range []string{"erofs", "ext4"} {
		cases = append(cases,
			bad{name: "dotdot in a tar, " + fs, args: convert(hostile("dotdot", file("../../etc/cron.d/evil", []byte("x"))), "--filesystem", fs),
				code: exitInvalid, says: []string{"layer 1 of 1", "../../etc/cron.d/evil", "rebuild the layer"}},
			bad{name: "dotdot further down, " + fs, args: convert(hostile("deep", dir("a"), file("a/../../b", []byte("x"))), "--filesystem", fs),
				code: exitInvalid, says: []string{"../b", "rebuild the layer"}},
			bad{name: "absolute path in a tar, " + fs, args: convert(hostile("absolute", file("/etc/cron.d/evil", []byte("x"))), "--filesystem", fs),
				code: exitInvalid, says: []string{"/etc/cron.d/evil", "absolute", "relative names"}},
			bad{name: "hard link out of the tree, " + fs, args: convert(hostile("link", tarEntry{header: tar.Header{Typeflag: tar.TypeLink, Name: "shadow", Linkname: "../../etc/shadow"}}), "--filesystem", fs),
				code: exitInvalid, says: []string{"shadow", "hard link target"}},
			bad{name: "a file of 8 EiB, " + fs, args: convert(hostile("eight", eight), "--filesystem", fs),
				code: exitInvalid, says: []string{"huge", fmt.Sprint(math.MaxInt64), "virtual size"}},
			bad{name: "a tar that ends early, " + fs, args: convert(g.pushLayers(t, "early", noise(25, 1<<20)[:700<<10]), "--filesystem", fs),
				code: exitCorrupt, says: []string{"layer 1 of 1", "unexpected EOF"}},
			bad{name: "a layer that is no tar, " + fs, args: convert(g.pushLayers(t, "notar", []byte(strings.Repeat("no tar ", 1000))), "--filesystem", fs),
				code: exitCorrupt, says: []string{"layer 1 of 1", "tar"}},
		)
	}
	cases = append(cases, g.badManifests(t, convert)...)
	cases = append(cases, g.badArchives(t, convert)...)
	g.refuse(t, cases)
}

// badManifests are manifests, indexes and configurations that are wrong.
func (g *ground) badManifests(t *testing.T, convert func(string, ...string) []string) []bad {
	t.Helper()
	brokenRaw := func(raw string) string { return newLayout(t).root(ocispec.MediaTypeImageManifest, []byte(raw)) }
	noIndex := newLayout(t)
	brokenIndex := newLayout(t)
	writeFile(t, filepath.Join(brokenIndex.dir, ocispec.ImageIndexFile), `{"manifests": [`)
	newer := newLayout(t)
	writeFile(t, filepath.Join(newer.dir, ocispec.ImageLayoutFile), `{"imageLayoutVersion":"2.0.0"}`)
	mismatch := newLayout(t)
	source := mismatch.root(ocispec.MediaTypeImageManifest, mismatch.json(mismatch.image(tarball())))
	blobs, err := filepath.Glob(filepath.Join(mismatch.dir, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range blobs {
		writeFile(t, b, "{}")
	}
	size := func(which string, n int64) string {
		return edited(t, func(_ *layout, m *ocispec.Manifest) {
			if which == "config" {
				m.Config.Size = n
			} else {
				m.Layers[0].Size = n
			}
		})
	}
	// The registry takes a manifest with any size.
	inRegistry := g.pushManifest(t, "hugesize", func(m *ocispec.Manifest) { m.Layers[0].Size = math.MaxInt64 })

	return []bad{
		{name: "broken manifest", args: convert(brokenRaw(`{"schemaVersion": 2, "config": {"mediaType`)), code: exitCorrupt, says: []string{"oci:", "JSON"}},
		{name: "manifest of another type", args: convert(brokenRaw(`["schemaVersion"]`)), code: exitCorrupt, says: []string{"JSON"}},
		{name: "manifest without anything", args: convert(brokenRaw(`{"schemaVersion":2}`)), code: exitCorrupt, says: []string{"config"}},
		{name: "manifest with a digest that is none", args: convert(brokenRaw(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:../../x","size":2}}`)), code: exitInvalid, says: []string{"digest"}},
		{name: "digest mismatch of a manifest", args: convert(source), code: exitCorrupt, says: []string{"the bytes have digest"}},
		{name: "layer of 8 EiB in the manifest", args: convert(size("layer", math.MaxInt64)), code: exitCorrupt, says: []string{"layer 1 of 1", "truncated"}},
		{name: "layer of 8 EiB in the registry", args: convert(inRegistry), code: exitCorrupt, says: []string{"layer 1 of 1", "truncated"}},
		{name: "configuration of 8 EiB", args: convert(size("config", math.MaxInt64)), code: exitInvalid, says: []string{"image configuration", "at most"}},
		{name: "negative size", args: convert(size("layer", -1)), code: exitInvalid, says: []string{"layer 1 of 1", "negative"}},
		{name: "broken configuration", args: convert(edited(t, func(l *layout, m *ocispec.Manifest) {
			m.Config = l.blob(ocispec.MediaTypeImageConfig, []byte(`{"rootfs": "none"`))
		})), code: exitCorrupt, says: []string{"image configuration"}},
		{name: "more layers than the configuration names", args: convert(edited(t, func(_ *layout, m *ocispec.Manifest) { m.Layers = append(m.Layers, m.Layers[0]) })), code: exitCorrupt, says: []string{"2 layers", "names 1", "build or push it again"}},
		{name: "content that is not the configuration's", args: convert(edited(t, func(l *layout, m *ocispec.Manifest) {
			m.Layers[0] = l.blob(ocispec.MediaTypeImageLayer, tarball(file("other", nil)))
		})), code: exitCorrupt, says: []string{"layer 1 of 1", "diff id"}},
		{name: "encrypted layer", args: convert(edited(t, func(_ *layout, m *ocispec.Manifest) { m.Layers[0].MediaType += "+encrypted" })), code: exitUnsupported, says: []string{"encrypted"}},
		{name: "no container image", args: convert(edited(t, func(_ *layout, m *ocispec.Manifest) { m.Config.MediaType = "application/vnd.cncf.helm.config.v1+json" })), code: exitUnsupported, says: []string{"helm", "no container image"}},
		{name: "no index", args: convert("oci:" + noIndex.dir), code: exitNotFound, says: []string{noIndex.dir, "index.json"}},
		{name: "broken index", args: convert("oci:" + brokenIndex.dir), code: exitCorrupt, says: []string{brokenIndex.dir, "index.json"}},
		{name: "newer layout", args: convert("oci:" + newer.dir), code: exitUnsupported, says: []string{newer.dir, "2.0.0"}},
		{name: "no layout", args: convert("oci:" + t.TempDir()), code: exitNotFound, says: []string{"not an OCI image layout"}},
		{name: "tag that is not in the layout", args: convert(edited(t, func(*layout, *ocispec.Manifest) {}) + ":none"), code: exitNotFound, says: []string{"none"}},
	}
}

// badArchives are archives that are wrong.
func (g *ground) badArchives(t *testing.T, convert func(string, ...string) []string) []bad {
	t.Helper()
	archive := func(name string, content []byte) string {
		return writeFile(t, filepath.Join(t.TempDir(), name), string(content))
	}
	saved := func(manifest string, more ...tarEntry) string {
		return "docker-archive:" + archive("saved.tar", tarball(append([]tarEntry{file("manifest.json", []byte(manifest))}, more...)...))
	}
	text := archive("text.tar", []byte(strings.Repeat("no archive\n", 200)))
	empty := archive("empty.tar", tarball())
	gz := archive("broken.tar.gz", append([]byte{0x1f, 0x8b, 8, 0}, make([]byte, 100)...))
	return []bad{
		{name: "archive that is none", args: convert("docker-archive:" + text), code: exitCorrupt, says: []string{text}},
		{name: "empty archive", args: convert("docker-archive:" + empty), code: exitNotFound, says: []string{empty, "docker save"}},
		{name: "archive that does not decompress", args: convert("oci-archive:" + gz), code: exitCorrupt, says: []string{gz}},
		{name: "archive with a broken manifest", args: convert(saved(`[{"Config"`)), code: exitCorrupt, says: []string{"saved.tar", "manifest.json"}},
		{name: "archive without an image", args: convert(saved(`[]`)), code: exitNotFound, says: []string{"saved.tar"}},
		{name: "archive that lacks a file", args: convert(saved(`[{"Config":"none.json","Layers":[]}]`)), code: exitNotFound, says: []string{"saved.tar", "none.json"}},
		{name: "archive with a name out of it", args: convert(saved(`[{"Config":"../../../../../../etc/hostname","Layers":[]}]`)), code: exitNotFound, says: []string{"saved.tar"}},
		{name: "archive with a link out of it", args: convert(saved(`[{"Config":"c.json","Layers":[]}]`,
			tarEntry{header: tar.Header{Typeflag: tar.TypeSymlink, Name: "c.json", Linkname: "/etc/hostname"}})), code: exitNotFound, says: []string{"saved.tar"}},
		{name: "archive of 8 EiB", args: convert("docker-archive:" + archive("huge.tar", tarball(tarEntry{header: tar.Header{Typeflag: tar.TypeReg, Name: "manifest.json", Size: math.MaxInt64, Format: tar.FormatGNU}}))),
			code: exitCorrupt, says: []string{"huge.tar", "manifest.json"}},
	}
}

// harm changes the bytes of a pushed image's layer (or its configuration, at -1) where
// the registry keeps them; nil removes them.
func (g *ground) harm(t *testing.T, ref string, layer int, change func([]byte) []byte) {
	t.Helper()
	m, _ := g.manifest(t, ref)
	d := m.Config
	if layer >= 0 {
		d = m.Layers[layer]
	}
	path := g.registry.Blob(d.Digest.String())
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if content = change(content); content == nil {
		err = os.RemoveAll(filepath.Dir(path))
	} else {
		err = os.WriteFile(path, content, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// manifest returns a pushed image's manifest.
func (g *ground) manifest(t *testing.T, ref string) (ocispec.Manifest, name.Reference) {
	t.Helper()
	parsed, err := name.ParseReference(ref, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	got, err := remote.Get(parsed, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(got.Manifest, &m); err != nil {
		t.Fatal(err)
	}
	return m, parsed
}

// rawManifest is pushed as it is.
type rawManifest []byte

func (r rawManifest) RawManifest() ([]byte, error)        { return r, nil }
func (r rawManifest) MediaType() (types.MediaType, error) { return types.OCIManifestSchema1, nil }

// pushManifest pushes an image whose manifest was changed.
func (g *ground) pushManifest(t *testing.T, repository string, edit func(*ocispec.Manifest)) string {
	t.Helper()
	ref := g.good(t, repository)
	m, parsed := g.manifest(t, ref)
	edit(&m)
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Put(parsed, rawManifest(raw), remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	return ref
}

// proxy passes connections to a registry until it has given a number of bytes; then
// it stops dead (connections and listener are closed) or stalls (nothing more comes).
type proxy struct {
	address, registry string
	listener          net.Listener
	die               bool
	stop              chan struct{}
	workers           sync.WaitGroup

	mu    sync.Mutex
	left  int64               // guarded by mu: bytes still to give
	conns map[net.Conn]string // guarded by mu
}

func newProxy(t *testing.T, registry string, bytes int64, die bool) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: l.Addr().String(), registry: registry, listener: l, die: die, left: bytes, stop: make(chan struct{}), conns: map[net.Conn]string{}}
	p.workers.Go(p.accept)
	t.Cleanup(func() {
		close(p.stop)
		p.close()
		p.workers.Wait()
	})
	return p
}

// through is a reference of the registry by way of the proxy.
func (p *proxy) through(ref string) string { return strings.Replace(ref, p.registry, p.address, 1) }

func (p *proxy) accept() {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", p.registry)
		if err != nil {
			in.Close()
			continue
		}
		p.mu.Lock()
		p.conns[in], p.conns[out] = "", ""
		p.mu.Unlock()
		p.workers.Go(func() { _, _ = io.Copy(out, in); out.Close() })
		p.workers.Go(func() { p.give(in, out); in.Close() })
	}
}

func (p *proxy) give(to io.Writer, from io.Reader) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		p.left -= int64(n)
		over := p.left < 0
		p.mu.Unlock()
		switch {
		case over && p.die:
			p.close()
			return
		case over:
			<-p.stop
			return
		}
		if _, werr := to.Write(buf[:n]); err != nil || werr != nil {
			return
		}
	}
}

func (p *proxy) close() {
	p.listener.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}
