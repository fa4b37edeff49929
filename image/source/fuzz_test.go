package source

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/registry"
	"github.com/thaw-project/thaw/image/spool"
	"github.com/thaw-project/thaw/kind"
)

// tarOf is an archive of files, in order of names and contents given.
func tarOf(t testing.TB, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := 0; i+1 < len(files); i += 2 {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: files[i], Mode: 0o644, Size: int64(len(files[i+1]))}
		if to, ok := strings.CutPrefix(files[i+1], "-> "); ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeSymlink, to, 0
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := io.WriteString(w, files[i+1]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// dockerSave is an archive of docker save.
func dockerSave(t testing.TB) []byte {
	t.Helper()
	layer := string(tarOf(t, "a", "hello"))
	config := fmt.Sprintf(`{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[%q,%q]}}`, digest.FromString(layer), digest.FromString(layer))
	return tarOf(t, "x/layer.tar", layer, "y/layer.tar", "-> ../x/layer.tar", "c.json", config,
		"manifest.json", `[{"Config":"c.json","RepoTags":["app:1"],"Layers":["x/layer.tar","y/layer.tar"]}]`)
}

// ociArchive is an image layout.
func ociArchive(t testing.TB) []byte {
	t.Helper()
	config := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[]}}`
	manifest := fmt.Sprintf(`{"schemaVersion":2,"config":{"mediaType":%q,"digest":%q,"size":%d},"layers":[]}`, ocispec.MediaTypeImageConfig, digest.FromString(config), len(config))
	d := digest.FromString(manifest)
	return tarOf(t, "oci-layout", `{"imageLayoutVersion":"1.0.0"}`, "blobs/sha256/"+d.Encoded(), manifest,
		"blobs/sha256/"+digest.FromString(config).Encoded(), config,
		"index.json", fmt.Sprintf(`{"schemaVersion":2,"manifests":[{"mediaType":%q,"digest":%q,"size":%d,"annotations":{"org.opencontainers.image.ref.name":"1"}}]}`, ocispec.MediaTypeImageManifest, d, len(manifest)))
}

// sound checks a source that was opened: its manifest is what its digest says, and
// what it names can be read or is refused with a kind.
func sound(t *testing.T, s Source) {
	t.Helper()
	defer s.Close()
	root := s.Root()
	raw, err := s.Manifest(t.Context(), root)
	if err != nil {
		t.Fatalf("the manifest of a source that was opened: %v", err)
	}
	if digest.FromBytes(raw) != root.Digest {
		t.Fatalf("a manifest of digest %s under %s", digest.FromBytes(raw), root.Digest)
	}
	var m ocispec.Manifest
	if json.Unmarshal(raw, &m) != nil {
		return
	}
	local, ok := s.(spool.Local)
	if !ok {
		t.Fatalf("%T is not local", s)
	}
	for _, d := range append(m.Layers, m.Config) {
		f, err := local.File(d)
		if err != nil {
			legible(t, err)
			continue
		}
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, 1<<20)); err != nil {
			t.Errorf("read %s: %v", d.Digest, err)
		}
		f.Close()
		r, err := s.Blob(t.Context(), d, 3)
		if err != nil {
			t.Fatalf("a file and no blob: %v", err)
		}
		if _, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20)); err != nil {
			t.Errorf("read %s: %v", d.Digest, err)
		}
		r.Close()
	}
}

// legible checks an error for a person: it has a kind, and is one line of bounded
// length.
func legible(t *testing.T, err error) {
	t.Helper()
	if kind.Of(err) == "" {
		t.Errorf("no kind: %v", err)
	}
	if text := err.Error(); strings.ContainsAny(text, "\n\r\x1b\x00") || len(text) > 6000 {
		t.Errorf("no line for a terminal (%d bytes): %.300q", len(text), text)
	}
}

// FuzzArchive: whatever the bytes, an archive opens as a sound image or not at all,
// and no file is left open or behind.
func FuzzArchive(f *testing.F) {
	docker, oci := dockerSave(f), ociArchive(f)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(docker); err != nil {
		f.Fatal(err)
	}
	if err := z.Close(); err != nil {
		f.Fatal(err)
	}
	for _, raw := range [][]byte{docker, oci, packed.Bytes(), docker[:700], oci[:1500], packed.Bytes()[:60], nil,
		[]byte("\x28\xb5\x2f\xfd"), tarOf(f, "manifest.json", "-> manifest.json"), tarOf(f, "a", "-> b", "b", "-> a", "manifest.json", "-> a")} {
		f.Add(raw, "")
		f.Add(raw, "app:1")
	}
	f.Fuzz(func(t *testing.T, raw []byte, ref string) {
		if len(raw) > 1<<20 {
			return // only slow
		}
		dir := t.TempDir()
		path := filepath.Join(dir, "image.tar")
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		before := descriptors(t)
		for _, open := range []func() (Source, error){
			func() (Source, error) { return openDockerArchive(t.Context(), "docker-archive:x", path, ref, dir) },
			func() (Source, error) { return openLayoutArchive(t.Context(), "oci-archive:x", path, ref, dir) },
		} {
			s, err := open()
			if err != nil {
				legible(t, err)
				continue
			}
			sound(t, s)
		}
		if after := descriptors(t); after > before {
			t.Errorf("%d files were left open", after-before)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	})
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// memory is a layout in memory, of whose blobs each has any digest it is asked for.
type memory struct {
	index, layout, blob string
	live                *int
}

func (m memory) open(name string) (spool.File, int64, error) {
	content := m.blob
	switch name {
	case ocispec.ImageIndexFile:
		content = m.index
	case ocispec.ImageLayoutFile:
		content = m.layout
	default:
		if clean(name) != name || !strings.HasPrefix(name, "blobs/sha256/") || len(name) != len("blobs/sha256/")+64 {
			return nil, 0, fmt.Errorf("a name that nobody should ask for: %q", name)
		}
	}
	*m.live++
	return opened{bytes.NewReader([]byte(content)), m.live}, int64(len(content)), nil
}

func (memory) Close() error { return nil }

type opened struct {
	io.ReaderAt
	live *int
}

func (o opened) Close() error { *o.live--; return nil }

// FuzzLayout: index.json and the blob it names are hostile; only blobs are asked for,
// by their digest.
func FuzzLayout(f *testing.F) {
	for _, index := range []string{
		`{"manifests":[{"digest":"BLOB","size":2}]}`,
		`{"manifests":[{"digest":"BLOB","annotations":{"org.opencontainers.image.ref.name":"a:1"}},{"digest":"sha256:../../../../etc/passwd"}]}`,
		`{"manifests":[{"digest":"sha512:00","size":-1}]}`, `[]`, `{"manifests":{}}`, `{`, ``, `null`,
	} {
		for _, tag := range []string{"", "1", "a:1"} {
			f.Add(index, `{"imageLayoutVersion":"1.0.0"}`, `{"schemaVersion":2,"config":{}}`, tag)
		}
	}
	f.Add(`{"manifests":[{"digest":"BLOB"}]}`, `{"imageLayoutVersion":"2"}`, `{"schemaVersion":1}`, "")
	f.Fuzz(func(t *testing.T, index, layout, blob, tag string) {
		open := 0
		index = strings.ReplaceAll(index, "BLOB", digest.FromString(blob).String())
		s, err := newLayout("oci:x", memory{index, layout, blob, &open}, tag)
		switch {
		case err != nil && strings.Contains(err.Error(), "nobody should ask"):
			t.Error(err)
		case err != nil:
			legible(t, err)
		default:
			sound(t, s)
		}
		if open != 0 {
			t.Errorf("%d files were left open", open)
		}
	})
}

// FuzzDockerManifest: manifest.json and the configuration of docker save are hostile.
func FuzzDockerManifest(f *testing.F) {
	layer := string(tarOf(f, "a", "hello"))
	f.Add(`[{"Config":"c.json","RepoTags":["app:1"],"Layers":["l.tar"]}]`, `{"rootfs":{"diff_ids":["`+digest.FromString(layer).String()+`"]}}`, layer, "app:1")
	f.Add(`[{"Config":"c.json","RepoTags":null,"Layers":["../l.tar"]},{}]`, `{"rootfs":{"diff_ids":["sha256:x"]}}`, "\x1f\x8b", "")
	f.Add(`[{"Config":"/c.json","Layers":["manifest.json"]}]`, `{"rootfs":{"diff_ids":[""]}}`, "", "")
	f.Add(`{}`, `null`, "", "")
	f.Add(`[{"Config":"c.json","RepoTags":["\u001b[31m\n"]}]`, ``, "", "x\ny")
	f.Fuzz(func(t *testing.T, manifest, config, layer, ref string) {
		path := filepath.Join(t.TempDir(), "image.tar")
		raw := tarOf(t, "manifest.json", manifest, "c.json", config, "l.tar", layer)
		if err := os.WriteFile(path, raw, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := openDockerArchive(t.Context(), "docker-archive:x", path, ref, "")
		if err != nil {
			legible(t, err)
			return
		}
		sound(t, s)
	})
}

// FuzzReference: whatever a user types for a source is looked for in one place, or
// refused with a kind. Nothing listens where the client may go.
func FuzzReference(f *testing.F) {
	for _, s := range []string{"app", "registry.example/app:1", "oci:dir:tag", "oci:", "oci-archive:x:y:z", "docker-archive::", "docker://a/b", "https://a", "", ":", "@", "a@sha256:0", "oci:/proc/self/mem", "docker-archive:/dev/zero", "oci:\x00"} {
		f.Add(s)
	}
	client, err := registry.New(registry.Options{PlainHTTP: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		t.Chdir(t.TempDir())
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // no registry is asked
		source, err := Open(ctx, s, client, "")
		if err != nil {
			// A path is repeated as it was typed.
			if kind.Of(err) == "" || len(err.Error()) > 2*len(s)+1000 {
				t.Errorf("%v of kind %q", err, kind.Of(err))
			}
			return
		}
		sound(t, source)
	})
}
