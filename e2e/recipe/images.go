package recipe

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// webServer answers HTTP on the port in $PORT, reading from all over its image as an
// application does.
//
//go:embed server.py
var webServer string

var (
	base = Step{Comment: "Debian, smallest variant", Bootstrap: []string{"ca-certificates", "libcap2-bin"}}

	python = Step{Comment: "python3", Install: []string{"python3"}}
)

// Web is the image of the demonstration: six layers of Debian with python3, a C++
// compiler and further tools, a web application, and a layer that deletes, replaces
// and adds what was below. About 190 MB compressed.
func Web() Recipe {
	return Recipe{
		Name: "web",
		Steps: []Step{
			base,
			python,
			{Comment: "compilers and tools", Install: []string{"g++", "make", "git", "perl", "libpython3-dev", "sqlite3"}},
			{Comment: "numerics", Install: []string{"python3-numpy"}},
			{Comment: "application", Files: map[string]string{
				"srv/web/server.py":         webServer,
				"srv/web/templates/page":    "<h1>{greeting}</h1>\n",
				"srv/web/templates/old":     "removed by the layer above\n",
				"srv/web/greeting":          "hello from the application layer\n",
				"etc/web/settings.d/00-all": "workers=2\n",
			}},
			{Comment: "clean up and configure", Script: `
				rm -rf /usr/share/doc /usr/share/man /srv/web/templates/old
				rm -rf /etc/web/settings.d && mkdir /etc/web/settings.d
				echo workers=4 >/etc/web/settings.d/10-workers
				echo "hello from the top layer" >/srv/web/greeting
				rm /usr/bin/sqlite3 && mkdir /usr/bin/sqlite3 && echo a directory now >/usr/bin/sqlite3/README
				ln /srv/web/server.py /srv/web/linked.py
				ln -s ../srv/web/server.py /usr/web
				cp /bin/true /usr/bin/tool && setcap cap_net_bind_service+ep /usr/bin/tool
				chmod 4755 /usr/bin/tool && setcap cap_net_bind_service+ep /usr/bin/tool
				chown 70000:80000 /srv/web/templates/page`},
		},
		Env: []string{"PORT=8080"},
		Cmd: []string{"/usr/bin/python3", "/srv/web/server.py"},
	}
}

// Small is an image of three layers whose lower two are shared by all; tag goes into
// the third. About 40 MB compressed.
func Small(tag string) Recipe {
	return Recipe{
		Name: "small-" + tag,
		Steps: []Step{
			base,
			python,
			{Comment: "application " + tag, Files: map[string]string{
				"srv/web/server.py":      webServer,
				"srv/web/templates/page": "<h1>{greeting}</h1>\n",
				"srv/web/greeting":       "hello from " + tag + "\n",
				"srv/web/data":           strings.Repeat(tag+" has data of its own\n", 20_000),
			}},
		},
		Env: []string{"PORT=8080"},
		Cmd: []string{"/usr/bin/python3", "/srv/web/server.py"},
	}
}

// Child is an image that builds on another: its layers, and one more.
func Child(parent Recipe) Recipe {
	child := parent
	child.Name = parent.Name + "-child"
	child.Steps = append(append([]Step{}, parent.Steps...), Step{Comment: "child", Script: `
		echo "hello from the child" >/srv/web/greeting
		rm -f /etc/issue && echo built on another image >/etc/child`})
	return child
}

// Push writes the image to a plain HTTP registry.
func Push(ctx context.Context, image v1.Image, reference string) error {
	ref, err := name.ParseReference(reference, name.Insecure)
	if err != nil {
		return err
	}
	if err := remote.Write(ref, image, remote.WithContext(ctx), remote.WithJobs(4)); err != nil {
		return fmt.Errorf("push %s: %w", reference, err)
	}
	return nil
}

// Layers is an image of uncompressed layers given as tar archives, stored as gzip. It
// has no command.
func Layers(tars [][]byte) (v1.Image, error) {
	image := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	image = mutate.ConfigMediaType(image, types.OCIConfigJSON)
	for _, content := range tars {
		layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(content)), nil
		}, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if image, err = mutate.Append(image, mutate.Addendum{Layer: layer, MediaType: types.OCILayer}); err != nil {
			return nil, err
		}
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", debianArchitecture()
	return mutate.ConfigFile(image, config)
}
