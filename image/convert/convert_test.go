package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	attacherv1 "github.com/thaw-project/thaw/api/attacher/v1"
	"github.com/thaw-project/thaw/image/annotation"
	"github.com/thaw-project/thaw/image/block"
	"github.com/thaw-project/thaw/image/filesystem"
	"github.com/thaw-project/thaw/image/filesystem/erofs"
	"github.com/thaw-project/thaw/image/filesystem/ext4"
	"github.com/thaw-project/thaw/image/layer/torture"
	"github.com/thaw-project/thaw/node/mount"
)

var discardLog = log.New(io.Discard, "", 0)

var builders = map[block.Filesystem]filesystem.Builder{block.Erofs: erofs.New(), block.Ext4: &ext4.Builder{}}

// variants are the combinations of mode and file system.
var variants = []struct {
	mode block.Mode
	fs   block.Filesystem
}{
	{block.ModeOverlayfs, block.Erofs}, {block.ModeOverlayfs, block.Ext4},
	{block.ModeOverlaybd, block.Erofs}, {block.ModeOverlaybd, block.Ext4},
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("mounts file systems and uses loop devices: run as root")
	}
}

func options(s *server, source, dest string) Options {
	return Options{
		Source: source, Dest: dest, Mode: block.ModeOverlayfs, Filesystem: block.Erofs, VirtualSizeBytes: 1 << 30,
		Builders: builders, Attacher: s.client(), SpoolDir: s.t.TempDir(), DockerConfigDir: s.dir,
	}
}

func convert(t testing.TB, o Options) Result {
	t.Helper()
	r, err := Convert(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(o.SpoolDir); len(left) > 0 {
		t.Errorf("spool files were left: %v", left)
	}
	return r
}

// unpacked are layers as containerd's overlayfs snapshotter has them, topmost first.
func unpacked(t testing.TB, layers []torture.Layer) []string {
	t.Helper()
	var uppers []string
	for i, l := range layers {
		upper := t.TempDir()
		must(t, os.Chmod(upper, 0o755))
		var opts []archive.ApplyOpt
		if i > 0 {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(uppers))
		}
		if _, err := archive.Apply(context.Background(), upper, bytes.NewReader(l.Tar), opts...); err != nil {
			t.Fatalf("containerd: layer %d: %v", i, err)
		}
		uppers = append([]string{upper}, uppers...)
	}
	return uppers
}

func overlay(t testing.TB, lower []string, f func(root string)) {
	t.Helper()
	if len(lower) == 1 {
		f(lower[0])
		return
	}
	at := t.TempDir()
	if err := unix.Mount("overlay", at, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
		t.Fatalf("overlay of %v: %v", lower, err)
	}
	defer unix.Unmount(at, unix.MNT_DETACH)
	f(at)
}

// mounted shows what a node would show of a block with count layers.
func mounted(t testing.TB, path string, mode block.Mode, fs block.Filesystem, count int, f func(root string)) {
	t.Helper()
	loop, err := mount.OpenLoop(path, mount.LoopOptions{ReadOnly: true, AutoClear: true})
	must(t, err)
	defer loop.Close()
	at := t.TempDir()
	data := ""
	if fs == block.Ext4 {
		data = "noload"
	}
	must(t, unix.Mount(loop.Name(), at, string(fs), unix.MS_RDONLY, data))
	defer unix.Unmount(at, 0)
	if mode == block.ModeOverlaybd {
		f(at)
		return
	}
	var lower []string
	for i := count - 1; i >= 0; i-- {
		lower = append(lower, filepath.Join(at, fmt.Sprint(i)))
	}
	overlay(t, lower, f)
}

func walk(t testing.TB, root string) map[string]torture.Node {
	t.Helper()
	n, err := torture.Walk(root)
	must(t, err)
	return n
}

// TestTorture converts an image with every case, in every variant, from a registry
// to another repository of it, and compares each block with what containerd unpacks.
func TestTorture(t *testing.T) {
	needRoot(t)
	since := time.Now().Add(-time.Second)
	stack := torture.Stack()
	uppers := unpacked(t, stack)
	h := newHub(t)
	p := tortured()
	source := h.push(p, "library/source", "v1")
	for _, v := range variants {
		t.Run(string(v.mode)+"/"+string(v.fs), func(t *testing.T) {
			s := newServer(t)
			o := options(s, source, h.host+"/team/converted:"+string(v.mode)+"-"+string(v.fs))
			o.Mode, o.Filesystem = v.mode, v.fs
			var events []Event
			o.Progress = func(e Event) { events = append(events, e) }
			r := convert(t, o)
			checkManifest(t, h, p, r, "team/converted", v.mode, v.fs)
			checkEvents(t, events, r)
			s.unfinished()
			for i := range stack {
				var want map[string]torture.Node
				overlay(t, uppers[len(uppers)-1-i:], func(root string) { want = walk(t, root) })
				mounted(t, s.pool.path(r.Images[0].Layers[i].Block), v.mode, v.fs, i+1, func(root string) {
					for _, line := range torture.Diff(want, walk(t, root), since) {
						t.Errorf("block of layer %d (%s): %s", i, stack[i].Name, line)
					}
				})
			}
			// Again: the same manifest, nothing written, and nothing fetched but the
			// manifest and the configuration.
			h.forget()
			again := convert(t, o)
			if again.Digest != r.Digest {
				t.Errorf("converted again: digest %s, before %s", again.Digest, r.Digest)
			}
			for i, l := range again.Images[0].Layers {
				if !l.Reused || l.FetchedBytes != 0 || l.WrittenBytes != 0 {
					t.Errorf("converted again: layer %d: %+v", i, l)
				}
			}
			if n := h.fetched(); n > 1 {
				t.Errorf("converted again: %d blobs were fetched, want the configuration only", n)
			}
		})
	}
}

// checkManifest checks that the destination holds an image that any client can pull
// and that says where the blocks are.
func checkManifest(t testing.TB, h *hub, p *picture, r Result, repository string, mode block.Mode, fs block.Filesystem) {
	t.Helper()
	raw, header := h.get(repository, r.Digest, false)
	if got := digest.FromBytes(raw); got.String() != r.Digest {
		t.Errorf("manifest has digest %s, result says %s", got, r.Digest)
	}
	if header.Get("Content-Type") != p.root.MediaType {
		t.Errorf("media type %q, want %q", header.Get("Content-Type"), p.root.MediaType)
	}
	var got, want ocispec.Manifest
	must(t, json.Unmarshal(raw, &got))
	must(t, json.Unmarshal(p.blobs[p.root.Digest], &want))
	if got.Config.Digest != want.Config.Digest || got.Annotations["org.example.image"] != "kept" || len(got.Layers) != len(want.Layers) {
		t.Fatalf("manifest %s differs in more than annotations of layers", raw)
	}
	for _, d := range append(got.Layers, got.Config) {
		if blob, _ := h.get(repository, d.Digest.String(), true); digest.FromBytes(blob) != d.Digest {
			t.Errorf("blob %s is not what it was", d.Digest)
		}
	}
	for i, l := range got.Layers {
		w := want.Layers[i]
		if l.Digest != w.Digest || l.Size != w.Size || l.MediaType != w.MediaType || l.Annotations["org.example.layer"] != fmt.Sprint("<", i, ">") {
			t.Errorf("layer %d: %+v, want %+v", i, l, w)
		}
		ref, ok, err := annotation.Parse(l.Annotations)
		if !ok || err != nil {
			t.Fatalf("layer %d: %v %v", i, ok, err)
		}
		wantRef := annotation.LayerRef{
			Block: r.Images[0].Layers[i].Block, Leaf: r.Images[0].Soldier, Mode: mode, Filesystem: fs,
			Index: i, Count: len(want.Layers), Target: "here",
		}
		if ref != wantRef {
			t.Errorf("layer %d: %+v, want %+v", i, ref, wantRef)
		}
		for k, v := range l.Annotations {
			if len(k)+len(v) >= 4096 {
				t.Errorf("annotation %s has %d bytes", k, len(v))
			}
		}
	}
}

func checkEvents(t testing.TB, events []Event, r Result) {
	t.Helper()
	last := map[int]Event{}
	for _, e := range events {
		if b := last[e.Index]; e.FetchedBytes < b.FetchedBytes || e.AppliedBytes < b.AppliedBytes {
			t.Errorf("event goes backwards: %+v after %+v", e, b)
		}
		last[e.Index] = e
	}
	for i, l := range r.Images[0].Layers {
		if e := last[i]; e.State != StateWritten || !e.Pushed || e.AppliedBytes != l.AppliedBytes || e.FetchedBytes != e.SizeBytes {
			t.Errorf("last event of layer %d: %+v", i, e)
		}
		if l.FetchedBytes == 0 || l.AppliedBytes == 0 || l.Duration == 0 {
			t.Errorf("result of layer %d: %+v", i, l)
		}
	}
}

// TestRecordedImage checks what the attacher is told, and that the soldier is a
// read-only clone of the leaf.
func TestRecordedImage(t *testing.T) {
	h, s := newHub(t), newServer(t)
	o := options(s, h.push(small(1, 3), "a/b", "1"), h.host+"/a/b:thaw")
	o.GlobalLayers = 2
	r := convert(t, o)
	i, err := s.client().GetImage(t.Context(), &attacherv1.GetImageRequest{Reference: Reference(o.Dest)})
	must(t, err)
	blocks := r.Images[0].Blocks()
	if strings.Join(i.Blocks, " ") != strings.Join(blocks, " ") || i.ManifestDigest != r.Digest || len(i.ChainIds) != 3 || i.VirtualSizeBytes != o.VirtualSizeBytes {
		t.Errorf("recorded %v", i)
	}
	for n, scope := range []string{"global-", "global-", "local-", "soldier-"} {
		if !strings.HasPrefix(blocks[n], scope) {
			t.Errorf("block %d is %s, want scope %s", n, blocks[n], scope)
		}
		l, err := s.pool.Get(blocks[n])
		must(t, err)
		if want := n < 3; l.Snapshot != want || !l.ReadOnly {
			t.Errorf("%s: %+v", blocks[n], l)
		}
		if n > 0 && l.Parent != blocks[n-1] {
			t.Errorf("%s is a clone of %q, want %q", blocks[n], l.Parent, blocks[n-1])
		}
	}
	s.unfinished()
}

// TestSharing converts a second image with a common base.
func TestSharing(t *testing.T) {
	h, s := newHub(t), newServer(t)
	a, b := newPicture(), newPicture()
	common := smallLayers(1, 2)
	a.image("amd64", append(append([]testLayer(nil), common...), smallLayers(100, 1)...))
	b.image("amd64", append(append([]testLayer(nil), common...), smallLayers(200, 1)...))
	ra := convert(t, options(s, h.push(a, "x", "a"), h.host+"/x:a-thaw"))
	rb := convert(t, options(s, h.push(b, "x", "b"), h.host+"/x:b-thaw"))
	ro := convert(t, options(s, h.host+"/x:b", h.host+"/other:b-thaw"))
	la, lb, lo := ra.Images[0].Layers, rb.Images[0].Layers, ro.Images[0].Layers
	for i := range lb {
		if lb[i].Reused != (i < 2) || (la[i].Block == lb[i].Block) != (i < 2) {
			t.Errorf("same repository, layer %d: %+v", i, lb[i])
		}
		if lo[i].Reused != (i < 1) || (lo[i].Block == lb[i].Block) != (i < 1) {
			t.Errorf("other repository, layer %d: %+v", i, lo[i])
		}
	}
	if ro.PushedBytes != 0 {
		t.Errorf("%d bytes were pushed to a registry that has them", ro.PushedBytes)
	}
}

// TestIndex converts platforms of an index with attestations.
func TestIndex(t *testing.T) {
	h := newHub(t)
	p := newPicture()
	amd, arm := p.image("amd64", smallLayers(1, 2)), p.image("arm64", smallLayers(10, 2))
	attest := func(of ocispec.Descriptor) ocispec.Descriptor {
		statement := p.blob("application/vnd.in-toto+json", []byte(`{"of":"`+of.Digest.String()+`"}`))
		config := p.blob(ocispec.MediaTypeImageConfig, []byte(`{"architecture":"unknown","os":"unknown"}`))
		d := p.manifest(ocispec.MediaTypeImageManifest, ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{statement}})
		d.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		d.Annotations = map[string]string{attestationType: "attestation-manifest", attestationDigest: of.Digest.String()}
		return d
	}
	attestAMD, attestARM := attest(amd), attest(arm)
	amd.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	arm.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}
	p.index(amd, arm, attestAMD, attestARM)
	source := h.push(p, "multi", "1")

	for _, c := range []struct {
		platforms []string
		images    []string
	}{
		{[]string{"linux/amd64"}, []string{"linux/amd64"}},
		{[]string{"linux/arm64"}, []string{"linux/arm64"}},
		{[]string{"linux/arm64", "linux/amd64"}, []string{"linux/amd64", "linux/arm64"}},
		{[]string{AllPlatforms}, []string{"linux/amd64", "linux/arm64"}},
	} {
		t.Run(strings.ReplaceAll(strings.Join(c.platforms, ","), "/", "-"), func(t *testing.T) {
			s := newServer(t)
			o := options(s, source, h.host+"/multi:thaw")
			o.Platforms = c.platforms
			r := convert(t, o)
			raw, header := h.get("multi", "thaw", false)
			if header.Get("Content-Type") != ocispec.MediaTypeImageIndex || digest.FromBytes(raw).String() != r.Digest {
				t.Fatalf("destination is %s with digest %s, want an index with %s", header.Get("Content-Type"), digest.FromBytes(raw), r.Digest)
			}
			var index ocispec.Index
			must(t, json.Unmarshal(raw, &index))
			if len(index.Manifests) != 2*len(c.images) || len(r.Images) != len(c.images) || index.Annotations["org.example.index"] != "kept" {
				t.Fatalf("index %s", raw)
			}
			for i, platform := range c.images {
				m, a := index.Manifests[i], index.Manifests[len(c.images)+i]
				if m.Platform.OS+"/"+m.Platform.Architecture != platform || m.Digest.String() != r.Images[i].ManifestDigest || r.Images[i].Platform != platform {
					t.Errorf("manifest %d is %+v, result %+v", i, m, r.Images[i])
				}
				raw, _ := h.get("multi", m.Digest.String(), false)
				if int64(len(raw)) != m.Size {
					t.Errorf("manifest %d has %d bytes, the index says %d", i, len(raw), m.Size)
				}
				// The attestation is the same document and speaks of the new one.
				if want := map[string]ocispec.Descriptor{"linux/amd64": attestAMD, "linux/arm64": attestARM}[platform]; a.Digest != want.Digest || a.Annotations[attestationDigest] != m.Digest.String() {
					t.Errorf("attestation %d is %+v", i, a)
				}
				if raw, _ := h.get("multi", a.Digest.String(), false); !bytes.Equal(raw, p.blobs[a.Digest]) {
					t.Errorf("attestation %d changed: %s", i, raw)
				}
			}
			images, err := s.client().ListImages(t.Context(), &attacherv1.ListImagesRequest{})
			must(t, err)
			if len(images.Images) != len(c.images) {
				t.Errorf("%d images are recorded, want one for each platform", len(images.Images))
			}
		})
	}
	t.Run("absent platform", func(t *testing.T) {
		o := options(newServer(t), source, h.host+"/multi:absent")
		o.Platforms = []string{"linux/s390x"}
		_, err := Convert(t.Context(), o)
		if err == nil || !strings.Contains(err.Error(), "linux/amd64, linux/arm64") || h.has("multi", "absent") {
			t.Errorf("error %v must name the platforms there are", err)
		}
	})
}

// TestConvertedAgain: a converted image is an ordinary image, also as a source.
func TestConvertedAgain(t *testing.T) {
	h, s := newHub(t), newServer(t)
	o := options(s, h.push(small(1, 2), "a", "1"), h.host+"/a:thaw")
	first := convert(t, o)
	o.Source, o.Dest = o.Dest, h.host+"/a:thaw2"
	if second := convert(t, o); second.Digest != first.Digest {
		t.Errorf("digest %s, want %s", second.Digest, first.Digest)
	}
}

// TestLocalSources converts the same image from each kind of local source.
func TestLocalSources(t *testing.T) {
	p := small(1, 2)
	dir := p.layout(t, "v1")
	archive := tarOf(t, dir)
	for _, source := range []string{"oci:" + dir, "oci:" + dir + ":v1", "oci-archive:" + archive, "oci-archive:" + archive + ":v1"} {
		h, s := newHub(t), newServer(t)
		r := convert(t, options(s, source, h.host+"/a:thaw"))
		checkManifest(t, h, p, r, "a", block.ModeOverlayfs, block.Erofs)
	}
	h, s := newHub(t), newServer(t)
	if _, err := Convert(t.Context(), options(s, "oci:"+dir+":v2", h.host+"/a:thaw")); err == nil || !strings.Contains(err.Error(), `"v1"`) {
		t.Errorf("error %v must name the tags there are", err)
	}
	// And to a layout.
	out := filepath.Join(t.TempDir(), "layout")
	o := options(s, "oci:"+dir, "oci:"+out+":thaw")
	r := convert(t, o)
	if again := convert(t, o); again.Digest != r.Digest {
		t.Errorf("digest %s, then %s", r.Digest, again.Digest)
	}
	o.Source, o.Dest = "oci:"+out+":thaw", h.host+"/a:from-layout"
	convert(t, o)
	if left, _ := filepath.Glob(out + "/*.partial"); len(left) > 0 {
		t.Errorf("left in the layout: %v", left)
	}
}
