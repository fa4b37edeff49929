package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/thaw-project/thaw/e2e/lab"
	"github.com/thaw-project/thaw/e2e/recipe"
)

// TestCRI runs pods as a kubelet does, through containerd's CRI with Thaw as the only
// snapshotter: the sandbox's image is an ordinary one, the containers' are converted.
// containerd has two ways to pull for CRI, its transfer service and its own.
func TestCRI(t *testing.T) {
	b := start(t)
	pause := b.pauseImage(t)
	for _, pull := range []struct {
		name  string
		local bool
	}{{"transfer", false}, {"local", true}} {
		t.Run(pull.name, func(t *testing.T) {
			s := b.thaw(t)
			c := b.containerd(t, lab.ContainerdOptions{Thaw: s, CRI: true, Sandbox: pause, LocalPull: pull.local})
			k := newKubelet(t, c)
			for _, v := range variants {
				// The variants have the same chainIDs, so each has layers of its own.
				source := b.image(t, recipe.Small("cri-"+v.String()))
				dest, _ := b.convert(t, s, source, v)
				k.runPod(t, v.String(), dest, "hello from cri-"+v.String())
			}
			ordinary := b.image(t, recipe.Small("cri-ordinary"))
			wantNoLayers(t, b, c.Root, "2M") // the sandbox's is smaller
			k.runPod(t, "ordinary", ordinary, "hello from cri-ordinary")
			k.removeImages(t)
		})
	}
}

// pauseImage builds and pushes the image of a sandbox.
func (b *bench) pauseImage(t *testing.T) string {
	t.Helper()
	binary, err := b.lab.Path("pause", "pause")
	if err != nil {
		t.Fatal(err)
	}
	build := b.lab.Command(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, "./pause")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pause: %v: %s", err, out)
	}
	content, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "pause", Mode: 0o755, Size: int64(len(content)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	image, err := recipe.Layers([][]byte{layer.Bytes()})
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Config.Entrypoint = []string{"/pause"}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return b.push(t, "pause", image)
}

// kubelet is a client of a containerd's CRI.
type kubelet struct {
	images  runtimeapi.ImageServiceClient
	runtime runtimeapi.RuntimeServiceClient
	logs    string
}

func newKubelet(t *testing.T, c *lab.Containerd) *kubelet {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+c.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &kubelet{images: runtimeapi.NewImageServiceClient(conn), runtime: runtimeapi.NewRuntimeServiceClient(conn), logs: t.TempDir()}
}

// runPod pulls an image, runs a pod of one container of it until that answers with
// want, and removes the pod.
func (k *kubelet) runPod(t *testing.T, name, ref, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	begin := time.Now()
	pod := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		LogDirectory: k.logs,
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent:    "/thaw-e2e/cri-" + name,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}},
		},
	}
	image, err := k.images.PullImage(ctx, &runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}, SandboxConfig: pod})
	if err != nil {
		t.Errorf("pull %s: %v", ref, err)
		return
	}
	pulled := time.Since(begin)
	sandbox, err := k.runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: pod})
	if err != nil {
		t.Errorf("run sandbox of %s: %v", name, err)
		return
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		if _, err := k.runtime.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: sandbox.PodSandboxId}); err != nil {
			t.Errorf("stop sandbox of %s: %v", name, err)
		}
		if _, err := k.runtime.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: sandbox.PodSandboxId}); err != nil {
			t.Errorf("remove sandbox of %s: %v", name, err)
		}
	}()
	port, err := lab.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	container, err := k.runtime.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: sandbox.PodSandboxId, SandboxConfig: pod,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: name},
			Image:    &runtimeapi.ImageSpec{Image: image.ImageRef},
			Envs:     []*runtimeapi.KeyValue{{Key: "PORT", Value: []byte(strconv.Itoa(port))}},
			LogPath:  name + ".log",
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE},
			}},
		},
	})
	if err != nil {
		t.Errorf("create container of %s: %v", name, err)
		return
	}
	if _, err := k.runtime.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: container.ContainerId}); err != nil {
		t.Errorf("start container of %s: %v", name, err)
		return
	}
	body, err := ready(ctx, port)
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(k.logs, name+".log"))
		t.Errorf("%s does not answer: %v: %s", name, err, log)
		return
	}
	if !strings.Contains(body, want) {
		t.Errorf("%s answers %q, want %q", name, body, want)
	}
	t.Logf("%s: pulled in %v, ready after %v", name, pulled.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
	out, err := k.runtime.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: container.ContainerId, Timeout: 30,
		Cmd: []string{"/bin/sh", "-c", "rm /srv/web/data && echo changed >/srv/web/greeting && sync && cat /srv/web/greeting && ls /srv/web"},
	})
	if err != nil || out.ExitCode != 0 || string(out.Stdout) != "changed\ngreeting\nserver.py\ntemplates\n" {
		t.Errorf("exec in %s: %v, %v", name, out, err)
	}
	// What a kubelet asks for to decide about evictions.
	stats, err := k.runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: container.ContainerId})
	if err != nil {
		t.Errorf("stats of %s: %v", name, err)
	} else if stats.GetStats().GetAttributes().GetId() != container.ContainerId {
		t.Errorf("stats of %s: %v", name, stats)
	}
}

// removeImages removes every image, as a kubelet that is short of disk.
func (k *kubelet) removeImages(t *testing.T) {
	t.Helper()
	list, err := k.images.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Images) < len(variants)+2 {
		t.Errorf("only %d images are listed", len(list.Images))
	}
	for _, i := range list.Images {
		if _, err := k.images.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: i.Id}}); err != nil {
			t.Errorf("remove image %s: %v", i.Id, err)
		}
	}
}

// ready waits until something answers HTTP on a port of this host.
func ready(ctx context.Context, port int) (string, error) {
	for {
		body, err := get(ctx, port)
		if err == nil {
			return body, nil
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func get(ctx context.Context, port int) (string, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d/", port), nil)
	if err != nil {
		return "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}
