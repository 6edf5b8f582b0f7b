"""`speechbrain-mpq track`: from a talker's face to a direction of arrival."""

import argparse

from ..utils import check_output

HELP = "follow a face in a video, and tell the direction that it gives"
EXAMPLE = "speechbrain-mpq track video.mp4 -o track.json --near 60"


def add_arguments(parser):
    """Add the command's options to a parser."""
    parser.add_argument("video", help="a video, or face boxes as .json or .npy")
    parser.add_argument("-o", "--output", help="write the track to this file")
    parser.add_argument(
        "--target",
        type=_target,
        help='which face: its number from the left, from 1, or "largest"',
    )
    parser.add_argument(
        "--near",
        type=float,
        metavar="DOA",
        help="the face nearest to this direction in degrees; it is an error "
        "if that is not near",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=15.0,
        help="how far from --near it may be, degrees (default: 15)",
    )
    parser.add_argument(
        "--audio", help="sound file that must be as long as the video"
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=1.0,
        help="smoothing: sways of this many Hz are halved (default: 1)",
    )
    parser.add_argument(
        "--smallest",
        type=float,
        default=0.1,
        help="smallest face, as a part of the picture's height (default: 0.1)",
    )
    _add_camera(parser.add_argument_group("camera"))
    boxes = parser.add_argument_group("boxes, where their file does not say")
    boxes.add_argument("--fps", type=float, help="frames per second")
    boxes.add_argument("--size", type=int, nargs=2, metavar=("W", "H"))


def run(options) -> int:
    """Follow the face, write its track and print its direction."""
    from ..vision.face_tracking import check_agreement, check_length

    seconds = _seconds(options.audio) if options.audio else None
    if options.output:  # before the work, not after it
        check_output(options.output, options.video, options.audio)
    track = _follow(options)
    if options.near is not None:
        check_agreement(track, options.near, options.tolerance)
    if seconds is not None:
        check_length(track, seconds)
    if options.output:
        track.save(options.output)
    print(_summary(track))
    return 0


def _add_camera(group):
    """Options of the camera."""
    group.add_argument(
        "--camera",
        choices=("panorama", "pinhole", "fisheye"),
        default="panorama",
        help="panorama: the angle is proportional to the horizontal position "
        "(default)",
    )
    group.add_argument(
        "--field-of-view",
        type=float,
        help="of a panorama, in degrees (default: 180)",
    )
    group.add_argument(
        "--focal", type=float, help="focal length of the others, in pixels"
    )
    group.add_argument(
        "--center",
        type=float,
        nargs=2,
        metavar=("X", "Y"),
        help="their principal point in pixels (default: the middle)",
    )
    group.add_argument(
        "--yaw",
        type=float,
        default=0.0,
        help="degrees by which the camera is turned to its right",
    )
    group.add_argument(
        "--reverse",
        action="store_true",
        help="the right edge is the side of 0 degrees, not the left",
    )


def _target(text):
    """A number or "largest"."""
    if text == "largest":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a number nor "largest"'
        ) from error


def _follow(options):
    """The track, from a video or from boxes."""
    from pathlib import Path

    from ..vision.face_tracking import track_boxes, track_video

    choice = {
        "target": options.target,
        "near": options.near,
        "bandwidth": options.bandwidth,
    }
    if Path(options.video).suffix in (".json", ".npy"):
        detections, fps, size = _boxes(options)
        return track_boxes(
            detections,
            fps,
            size,
            camera=_camera(options, *size),
            source=options.video,
            **choice,
        )
    from ..vision.video import CascadeDetector, Video

    video = Video(options.video)
    return track_video(
        video,
        CascadeDetector(smallest=options.smallest),
        camera=_camera(options, video.width, video.height),
        **choice,
    )


def _boxes(options):
    """Given boxes, their frame rate and the picture's size."""
    from ..vision.face_tracking import read_boxes

    detections, about = read_boxes(options.video)
    fps = about.get("fps") if options.fps is None else options.fps
    size = options.size or (about.get("width"), about.get("height"))
    if fps is None or None in size:
        raise ValueError(
            f"{options.video} does not say how fast and how large the video "
            "is: give --fps 25 --size 640 360"
        )
    return detections, fps, tuple(int(side) for side in size)


def _camera(options, width, height):
    """The camera that was asked for."""
    from ..vision import camera

    turned = {"yaw": options.yaw, "reverse": options.reverse}
    calibrated = options.focal is not None or options.center is not None
    if options.camera == "panorama":
        if calibrated:
            raise ValueError(
                "--focal and --center are those of --camera pinhole or fisheye"
            )
        view = options.field_of_view
        view = 180.0 if view is None else view
        return camera.PanoramaCamera(width, view, **turned)
    if options.focal is None or options.field_of_view is not None:
        raise ValueError(
            f"a {options.camera} camera is given by --focal, in pixels, and "
            "has no --field-of-view"
        )
    kind = {"pinhole": camera.PinholeCamera, "fisheye": camera.FisheyeCamera}
    center = options.center or (width / 2, height / 2)
    return kind[options.camera](options.focal, tuple(center), **turned)


def _seconds(path):
    """Duration of a sound file."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path} cannot be read as sound: {error}") from error


def _summary(track):
    """What was found, on one line."""
    seen = int(track.visible.sum())
    return (
        f"{track.doa:.1f} degrees ({track.doas.min():.1f} to "
        f"{track.doas.max():.1f}): face {track.target} of {track.faces}, "
        f"visible in {seen} of {len(track.doas)} frames"
    )
