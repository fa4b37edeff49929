package kill

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images that are converted. They have their lowest layer in common.
const (
	firstImage  = "first"
	secondImage = "second"
)

var imageLayers = map[string][]uint64{firstImage: {1, 2}, secondImage: {1, 3, 4}}

// layoutOf writes an image into an OCI layout of the chain, once, and returns its path.
func layoutOf(c *chain, name string) (string, error) {
	path := c.path("source-" + name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	image := v1.Image(empty.Image)
	config, err := image.ConfigFile()
	if err != nil {
		return "", err
	}
	config.Architecture, config.OS = "amd64", "linux"
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return "", err
	}
	for _, seed := range imageLayers[name] {
		content, err := layerOf(seed)
		if err != nil {
			return "", err
		}
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err != nil {
			return "", err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return "", err
		}
	}
	to, err := layout.Write(path+".new", empty.Index)
	if err != nil {
		return "", err
	}
	if err := to.AppendImage(image); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}

// layerOf is a layer of a few files.
func layerOf(seed uint64) ([]byte, error) {
	random := rand.NewChaCha8([32]byte{byte(seed)})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dir := fmt.Sprintf("layer%d/", seed)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
		return nil, err
	}
	for i, size := range []int{10, 5000, 70000, 150000} {
		content := make([]byte, size)
		random.Read(content)
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%sfile%d", dir, i), Mode: 0o644, Size: int64(size)}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: dir + "link", Linkname: "file1"}); err != nil {
		return nil, err
	}
	return b.Bytes(), w.Close()
}
