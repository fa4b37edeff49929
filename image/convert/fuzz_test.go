package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/image/source"
	"github.com/thaw-project/thaw/kind"
)

// documents is a source of three documents: the root, a manifest that an index may
// name, and a configuration. It verifies no digest, which sources do, so that what a
// fuzzer changes gets further.
type documents struct {
	mediaType              string
	root, manifest, config []byte
}

var _ source.Source = (*documents)(nil)

func (d *documents) String() string { return "fuzzed" }
func (d *documents) Close() error   { return nil }

func (d *documents) Root() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.mediaType, Digest: digest.FromBytes(d.root), Size: int64(len(d.root))}
}

func (d *documents) Manifest(_ context.Context, of ocispec.Descriptor) ([]byte, error) {
	if of.Digest == digest.FromBytes(d.root) {
		return d.root, nil
	}
	return d.manifest, nil
}

func (d *documents) Blob(_ context.Context, _ ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(d.config[offset:])), nil
}

// legible checks an error for a person.
func legible(t *testing.T, err error) {
	t.Helper()
	if kind.Of(err) == "" {
		t.Errorf("no kind: %v", err)
	}
	if text := err.Error(); strings.ContainsAny(text, "\n\r\x1b\x00") || len(text) > 20_000 {
		t.Errorf("no line for a terminal (%d bytes): %.300q", len(text), text)
	}
}

// FuzzManifest: an image whose manifests and configuration are hostile is refused with
// a clear error, or its converted manifest is the source's with our annotations on each
// layer, the same each time.
func FuzzManifest(f *testing.F) {
	const (
		zeros  = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
		image  = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"CONFIG","size":SIZE},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"` + zeros + `","size":5,"annotations":{"a":"<b>","containerd.io/snapshot/thaw.old":"x"},"x":1.00}],"annotations":{"k":"\u2028"},"unknown":[1,2]}`
		config = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + zeros + `"]}}`
		index  = `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"MANIFEST","size":7,"platform":{"os":"linux","architecture":"amd64"},"data":"e30="},{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"` + zeros + `","size":1,"platform":{"os":"unknown","architecture":"unknown"},"annotations":{"vnd.docker.reference.digest":"MANIFEST","vnd.docker.reference.type":"attestation-manifest"}}]}`
	)
	f.Add(ocispec.MediaTypeImageManifest, image, "", config, "")
	f.Add(ocispec.MediaTypeImageIndex, index, image, config, "")
	f.Add(ocispec.MediaTypeImageIndex, index, image, config, "all")
	f.Add(dockerList, strings.Replace(index, `"platform":{"os":"linux","architecture":"amd64"},`, "", 1), image, config, "linux/amd64")
	f.Add(dockerManifest, strings.ReplaceAll(image, "5", "-5"), "", config, "linux/arm64/v8")
	f.Add(ocispec.MediaTypeImageManifest, `{"config":{"digest":"CONFIG","size":9223372036854775807}}`, "", config, "")
	f.Add(ocispec.MediaTypeImageIndex, `{"manifests":[null,{}]}`, "null", "null", "x")
	f.Add(ocispec.MediaTypeImageIndex, `{"manifests":null}`, "", "", "all")
	f.Add("application/vnd.docker.distribution.manifest.v1+prettyjws", "", "", "", "")
	f.Fuzz(func(t *testing.T, mediaType, root, manifest, config, platform string) {
		fill := func(s, of, with string) string {
			return strings.NewReplacer(of, digest.FromString(with).String(), "SIZE", strconv.Itoa(len(with))).Replace(s)
		}
		manifest = fill(manifest, "CONFIG", config)
		root = fill(fill(root, "MANIFEST", manifest), "CONFIG", config)
		s := &documents{mediaType, []byte(root), []byte(manifest), []byte(config)}
		var wanted []string
		if platform != "" {
			wanted = []string{platform}
		}
		convert := func() ([]byte, *plan, error) {
			p, err := makePlan(t.Context(), s, wanted)
			if err != nil {
				return nil, nil, err
			}
			o := Options{Mode: block.ModeOverlayfs, Filesystem: block.Erofs}
			o.EnsureDefaults()
			var raw []byte
			for _, i := range p.images() {
				i.nameBlocks(&o, "registry.example/app")
				if err := i.annotate(&o, "local"); err != nil {
					return nil, nil, err
				}
				raw = i.convertedRaw
			}
			if p.index != nil {
				if raw, err = p.document(); err != nil {
					return nil, nil, err
				}
			}
			return raw, p, nil
		}
		raw, p, err := convert()
		if err != nil {
			legible(t, err)
			return
		}
		if again, _, err := convert(); err != nil || !bytes.Equal(raw, again) {
			t.Errorf("converted again: %v\n%s\n%s", err, raw, again)
		}
		if !json.Valid(raw) {
			t.Errorf("no JSON: %s", raw)
		}
		if len(p.images()) == 0 {
			t.Error("nothing was chosen, without an error")
		}
		for _, i := range p.images() {
			checkConverted(t, s, i)
		}
	})
}

// checkConverted compares a converted manifest with its source.
func checkConverted(t *testing.T, s *documents, i *image) {
	t.Helper()
	was, err := s.Manifest(t.Context(), i.descriptor)
	if err != nil {
		t.Fatal(err)
	}
	var before, after map[string]json.RawMessage
	var old, converted ocispec.Manifest
	for _, u := range []struct {
		raw  []byte
		into any
	}{{was, &before}, {i.convertedRaw, &after}, {was, &old}, {i.convertedRaw, &converted}} {
		if err := json.Unmarshal(u.raw, u.into); err != nil {
			// Fields that a conversion has no use for may be anything.
			return
		}
	}
	if i.converted.Digest != digest.FromBytes(i.convertedRaw) || i.converted.Size != int64(len(i.convertedRaw)) {
		t.Errorf("descriptor %+v of %d bytes", i.converted, len(i.convertedRaw))
	}
	for k, v := range before {
		if k != "layers" && !sameJSON(v, after[k]) {
			t.Errorf("field %q was %s and is %s", k, v, after[k])
		}
	}
	if len(old.Layers) != len(converted.Layers) || len(before) != len(after) {
		t.Fatalf("%d layers of %d, %d fields of %d", len(converted.Layers), len(old.Layers), len(after), len(before))
	}
	for n, l := range converted.Layers {
		if l.Digest != old.Layers[n].Digest || l.Size != old.Layers[n].Size || l.MediaType != old.Layers[n].MediaType {
			t.Errorf("layer %d is %+v, was %+v", n, l, old.Layers[n])
		}
		ref, ok, err := annotation.Parse(l.Annotations)
		if err != nil || !ok || ref.Index != n || ref.Count != len(converted.Layers) || ref.Leaf != i.soldier || ref.Block != i.layers[n].block {
			t.Errorf("layer %d of %d has annotations %v: %+v, %v", n, len(converted.Layers), l.Annotations, ref, err)
		}
	}
}

// sameJSON compares values as the encoder writes them: compact.
func sameJSON(a, b json.RawMessage) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

// FuzzAttestation: what a manifest that passes through refers to is listed, or refused
// with a clear error.
func FuzzAttestation(f *testing.F) {
	f.Add([]byte(`{"config":{"digest":"sha256:` + strings.Repeat("0", 64) + `","size":3},"layers":[{"digest":"sha256:` + strings.Repeat("1", 64) + `"}],"blobs":[{}]}`))
	f.Add([]byte(`{"layers":[null,1,"x"]}`))
	f.Add([]byte(`{"layers":{}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		list, err := blobsOf(raw)
		if err != nil {
			legible(t, err)
			return
		}
		for _, d := range list {
			if d.Size < 0 || d.Digest.Validate() != nil {
				t.Errorf("%+v", d)
			}
		}
	})
}

// FuzzStream: whatever the bytes of a layer's blob, they are decompressed within the
// limit or refused with a clear error, and the stream's goroutine ends.
func FuzzStream(f *testing.F) {
	tar := torture.NewBuilder().File("a", []byte("hello")).Tar()
	for _, c := range []compression{"", "gzip", "zstd"} {
		_, packed := c.pack(tar)
		f.Add(packed, 7)
		f.Add(packed[:len(packed)/2], 1)
		f.Add(append(packed, packed...), 1<<16)
		f.Add(append(packed, "trailing"...), 3)
	}
	_, bomb := compression("gzip").pack(make([]byte, 4<<20))
	f.Add(bomb, 1<<16)
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff}, 1)
	f.Add([]byte{}, 1)
	f.Add([]byte("\x1f\x8b\b0000000"), 4) // ends in the middle of gzip's header
	f.Fuzz(func(t *testing.T, blob []byte, step int) {
		const most = 2 << 20
		var reported int64
		s := newLayerStream(t.Context(), func(context.Context) io.Reader { return bytes.NewReader(blob) }, most, func(n int64) { reported = n })
		defer s.Close()
		buf := make([]byte, 1+uint(step)%(1<<20))
		var got []byte
		for {
			n, err := s.Read(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				legible(t, err)
				if s.cause() == nil {
					t.Error("an error without a cause")
				}
				return
			}
		}
		d, err := s.finish()
		if err != nil || len(got) > most || reported != int64(len(got)) || d != digest.FromBytes(got) {
			t.Errorf("%d bytes, %d reported, digest %s: %v", len(got), reported, d, err)
		}
	})
}
