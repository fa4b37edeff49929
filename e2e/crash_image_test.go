package e2e

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	layerfile "github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/thaw-project/thaw/e2e/launch"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// crashWorkload is what the containers run that live through a crash test.
//
//go:embed crash_workload.py
var crashWorkload string

// residentRecipe is their image: Debian with python, and a list of what every file
// of it holds, written by the machine that built it.
func residentRecipe() recipe.Recipe {
	r := recipe.Small("crash")
	r.Name = "crash"
	r.Steps = append(append([]recipe.Step{}, r.Steps[:2]...),
		recipe.Step{Comment: "workload", Files: map[string]string{"srv/crash/workload.py": crashWorkload}},
		recipe.Step{Comment: "sums", Script: `
			mkdir -p /crash
			find / -xdev -type f ! -path '/proc/*' ! -path '/sys/*' ! -path '/dev/*' ! -path '/run/*' ! -path '/etc/resolv.conf' ! -path '/etc/hosts' ! -path '/srv/crash.sums' \
				-exec sha256sum -- {} + >/srv/crash.sums
			mv /srv/crash.sums /srv/crash/sums`})
	r.Env = []string{"PYTHONDONTWRITEBYTECODE=1"}
	r.Cmd = []string{"/usr/bin/python3", "-u", "/srv/crash/workload.py"}
	return r
}

// onVariant returns image with a layer below all others that names the variant, and
// layers above. One node keeps one containerd snapshot for one chain of layers, so
// images that are to be served in different ways there must differ from the bottom.
func onVariant(image v1.Image, v variant, above ...v1.Layer) (v1.Image, error) {
	layers, err := image.Layers()
	if err != nil {
		return nil, err
	}
	marker, err := tarLayer(map[string][]byte{"etc/variant": []byte(v.String() + "\n")})
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	made := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for _, l := range slices.Concat([]v1.Layer{marker}, layers, above) {
		if made, err = mutate.Append(made, mutate.Addendum{Layer: l, MediaType: types.OCILayer}); err != nil {
			return nil, err
		}
	}
	base, err := made.ConfigFile()
	if err != nil {
		return nil, err
	}
	base = base.DeepCopy()
	base.OS, base.Architecture, base.Config = config.OS, config.Architecture, config.Config
	return mutate.ConfigFile(made, base)
}

// tarLayer is a layer of files; nil content is a whiteout.
func tarLayer(files map[string][]byte) (v1.Layer, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(files[name])), Typeflag: tar.TypeReg}); err != nil {
			return nil, err
		}
		if _, err := w.Write(files[name]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	content := b.Bytes()
	return layerfile.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		layerfile.WithMediaType(types.OCILayer), layerfile.WithCompressionLevel(gzip.BestSpeed))
}

// item is an image of which there was none before, and what became of it.
type item struct {
	name         string // also the container's id
	variant      variant
	ordinary     bool   // not converted: its layers are unpacked
	source, dest string // references; equal when ordinary
	sums         map[string]string
	state        itemState
	container    *launch.Container // when running
}

type itemState int

const (
	pushed    itemState = iota
	converted           // and not known to containerd
	running             // pulled, with a container
)

// newItem makes an image of random content and pushes it. One in three goes to a
// repository of its own, where only the lowest layer is shared.
func (c *crash) newItem(t *testing.T, v variant, ordinary bool) *item {
	t.Helper()
	c.made++
	it := &item{name: fmt.Sprintf("item%d-%s", c.made, c.suffix), variant: v, ordinary: ordinary, sums: map[string]string{}}
	first, second := map[string][]byte{}, map[string][]byte{}
	for i := range 2 + c.rnd.IntN(30) {
		first[fmt.Sprintf("srv/item/dir%d/file%d", i%4, i)] = randomBytes(c.rnd, c.rnd.IntN(200<<10))
	}
	first["srv/item/large"] = randomBytes(c.rnd, 1<<20+c.rnd.IntN(3<<20))
	names := slices.Sorted(maps.Keys(first))
	second["srv/item/dir0/.wh.file0"] = nil
	second["srv/item/dir1/file1"] = randomBytes(c.rnd, 1+c.rnd.IntN(1<<20))
	second["srv/web/greeting"] = []byte("hello from " + it.name + "\n")
	for _, name := range names {
		it.sums["/"+name] = sum(first[name])
	}
	delete(it.sums, "/srv/item/dir0/file0")
	it.sums["/srv/item/dir1/file1"] = sum(second["srv/item/dir1/file1"])

	var above []v1.Layer
	for _, files := range []map[string][]byte{first, second} {
		l, err := tarLayer(files)
		if err != nil {
			t.Fatal(err)
		}
		above = append(above, l)
	}
	base, err := c.b.builder.Build(t.Context(), recipe.Small("crash"))
	if err != nil {
		t.Fatal(err)
	}
	image, err := onVariant(base, v, above...)
	if err != nil {
		t.Fatal(err)
	}
	repository := "crash-" + v.String()
	if c.rnd.IntN(3) == 0 {
		repository += "-" + it.name
	}
	it.source = c.b.registry.Ref(repository, it.name)
	it.dest = it.source + "-thaw"
	if ordinary {
		it.dest = it.source
	}
	if err := recipe.Push(t.Context(), image, it.source); err != nil {
		t.Fatal(err)
	}
	return it
}

func randomBytes(rnd *rand.Rand, n int) []byte {
	var key [32]byte
	for i := range key {
		key[i] = byte(rnd.Uint32())
	}
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:])
}
