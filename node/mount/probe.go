package mount

import (
	"encoding/binary"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Fact is one thing a kernel or a machine can or cannot do.
type Fact struct {
	Name string `json:"name"`
	OK   bool   `json:"ok"`
	// Need says what does not work without it.
	Need string `json:"need"`
	// Detail is what was found; if not OK, with what to do about it.
	Detail string `json:"detail"`
}

// The names of the facts that Probe returns, in this order.
const (
	FactRoot       = "root"
	FactFUSE       = "fuse"
	FactFUSEResend = "fuse-resend"
	FactErofs      = "erofs"
	FactErofsFile  = "erofs-file-backed"
	FactLoop       = "loop"
	FactOverlay    = "overlay"
	FactExt4       = "ext4"
	FactDetached   = "detached-mounts"
	FactIOUring    = "io_uring"
)

// Probe finds out what this machine can do, without changing anything but loading
// the kernel modules it asks for. It is for people: the rest of the package tries
// instead of asking.
func Probe() []Fact {
	major, minor, release := kernelVersion()
	atLeast := func(ma, mi int) bool { return major > ma || major == ma && minor >= mi }
	filesystems := readFilesystems()

	root := Fact{Name: FactRoot, Need: "mounting", OK: hasSysAdmin(), Detail: "CAP_SYS_ADMIN is there"}
	if !root.OK {
		root.Detail = "CAP_SYS_ADMIN is missing: run as root"
	}

	fuse := Fact{Name: FactFUSE, Need: "showing disks to the kernel"}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
		fuse.OK, fuse.Detail = true, "/dev/fuse opens"
	} else {
		fuse.Detail = "open /dev/fuse: " + err.Error() + ": load the module (modprobe fuse) or use a kernel with CONFIG_FUSE_FS"
	}

	resend := Fact{Name: FactFUSEResend, Need: "a killed or upgraded server being only a pause for running containers",
		OK: fuse.OK && atLeast(6, 9), Detail: "Linux " + release}
	if !resend.OK {
		resend.Detail += ": FUSE_NOTIFY_RESEND needs 6.9; stop the server only when no container runs"
	}

	erofs := fsFact(FactErofs, "erofs", "images with --filesystem erofs", "CONFIG_EROFS_FS", filesystems)

	return []Fact{root, fuse, resend, erofs, erofsFileFact(erofs.OK), loopFact(),
		fsFact(FactOverlay, "overlay", "mode overlayfs and ordinary images", "CONFIG_OVERLAY_FS", filesystems),
		fsFact(FactExt4, "ext4", "images with --filesystem ext4, and block-level writable layers", "CONFIG_EXT4_FS", filesystems),
		detachedFact(), ioUringFact()}
}

func kernelVersion() (major, minor int, release string) {
	var u unix.Utsname
	unix.Uname(&u)
	release = unix.ByteSliceToString(u.Release[:])
	parts := strings.SplitN(release, ".", 3)
	if len(parts) >= 2 {
		major, _ = strconv.Atoi(parts[0])
		minor, _ = strconv.Atoi(strings.TrimRightFunc(parts[1], func(r rune) bool { return r < '0' || r > '9' }))
	}
	return major, minor, release
}

func hasSysAdmin() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_ADMIN) != 0
}

func readFilesystems() map[string]bool {
	raw, _ := os.ReadFile("/proc/filesystems")
	known := make(map[string]bool)
	for line := range strings.Lines(string(raw)) {
		if f := strings.Fields(line); len(f) > 0 {
			known[f[len(f)-1]] = true
		}
	}
	return known
}

// fsFact asks the kernel for a file system; fsopen loads its module as mount would.
func fsFact(fact, fs, need, config string, known map[string]bool) Fact {
	f := Fact{Name: fact, Need: need}
	fd, err := unix.Fsopen(fs, unix.FSOPEN_CLOEXEC)
	switch {
	case err == nil:
		unix.Close(fd)
		f.OK, f.Detail = true, "the kernel has it"
	case known[fs]:
		f.OK, f.Detail = true, "listed in /proc/filesystems"
	default:
		f.Detail = err.Error() + ": load the module (modprobe " + fs + ") or use a kernel with " + config
	}
	return f
}

// erofsFileFact tries to mount a regular file that is no EROFS: a kernel that can
// mount files says that it is none, one that cannot says that it is no block device.
func erofsFileFact(erofs bool) Fact {
	f := Fact{Name: FactErofsFile, Need: "mounting EROFS without a loop device (else one is used)"}
	if !erofs {
		f.Detail = "there is no EROFS"
		return f
	}
	file, err := os.CreateTemp("", "thaw-probe-")
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	defer os.Remove(file.Name())
	defer file.Close()
	err = file.Truncate(64 << 10)
	fs := -1
	if err == nil {
		fs, err = unix.Fsopen("erofs", unix.FSOPEN_CLOEXEC)
	}
	if err == nil {
		defer unix.Close(fs)
		err = unix.FsconfigSetString(fs, "source", file.Name())
	}
	if err == nil {
		err = unix.FsconfigCreate(fs)
	}
	switch err {
	case unix.EINVAL: // it looked for the superblock
		f.OK, f.Detail = true, "the kernel mounts files"
	case unix.ENOTBLK:
		f.Detail = "this needs Linux 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE"
	default:
		f.Detail = "could not be found out"
		if err != nil {
			f.Detail += ": " + err.Error()
		}
	}
	return f
}

func loopFact() Fact {
	f := Fact{Name: FactLoop, Need: "ext4, and EROFS on kernels without file-backed mounts"}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		f.Detail = err.Error() + ": load the module (modprobe loop) or use a kernel with CONFIG_BLK_DEV_LOOP"
		return f
	}
	control.Close()
	used, err := Loops()
	if err != nil {
		f.Detail = err.Error()
		return f
	}
	f.OK, f.Detail = true, strconv.Itoa(len(used))+" loop devices in use"
	return f
}

func detachedFact() Fact {
	f := Fact{Name: FactDetached, Need: "converting to ext4 without leaving mounts behind"}
	fd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		f.Detail = "fsopen: " + err.Error() + ": this needs Linux 5.2 and CAP_SYS_ADMIN"
		return f
	}
	unix.Close(fd)
	f.OK, f.Detail = true, "fsopen works"
	return f
}

// ioUringParams has the size of struct io_uring_params, 120 bytes.
type ioUringParams [120]byte

func ioUringFact() Fact {
	f := Fact{Name: FactIOUring, Need: "asynchronous I/O of the lvol store (else pread and pwrite are used)"}
	var params ioUringParams
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&params)), 0)
	if errno == 0 {
		unix.Close(int(fd))
		// features is at 20: sq_entries, cq_entries, flags, sq_thread_cpu, sq_thread_idle come before.
		f.OK, f.Detail = true, "io_uring_setup works, features 0x"+strconv.FormatUint(uint64(binary.NativeEndian.Uint32(params[20:])), 16)
		return f
	}
	f.Detail = "io_uring_setup: " + errno.Error()
	if errno == unix.EPERM {
		f.Detail += ": see the sysctl kernel.io_uring_disabled, and the seccomp profile if this is a container"
	}
	return f
}
